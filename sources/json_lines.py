"""JSON lines: a record a line."""

import codecs
import io
import json

from common.errors import UserError
from sources import reading
from sources.reading import fault_of

parse = json.JSONDecoder().decode


def documents(reader, of_record, found):
    """What `of_record` makes of each line. Yields (documents, False): those of about a block of bytes."""
    while block := reader.file.read(reading.CHUNK) + reader.file.readline():
        documents, notes = [], []
        for number, line in enumerate(io.BytesIO(block), reader.n_lines + 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was joined to it
            if not line or line.isspace():
                continue
            try:
                document, noted = of_record(parse(line.decode()))
                documents.append(document)
                notes += noted
                continue
            except UnicodeDecodeError:
                fault = fault_of([line])
            except RecursionError:
                fault = "not usable JSON (nested too deeply)"
            except ValueError as error:
                fault = f"not JSON ({error})"
            except UserError as error:
                fault = str(error)
            found.leave_out(reader.path, number, fault, len(line))
        found.add(notes)
        reader.passed(block)
        yield documents, False
