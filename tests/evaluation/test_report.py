"""evaluate.py --report: the page about a model, read back from its HTML and its Markdown."""

import dataclasses
import html.parser
import json
import re
import shutil

import pytest
from conftest import MODEL, RUN, Project
from made_models import TEXT, polite

import engine.checkpoint
import evaluate
from tokenizer import CharTokenizer

HOSTILE = "<script>alert(1)</script> | `x` **b** [a](http://b.c)"
QUESTIONS = [
    {"question": HOSTILE + "\u202e\x07", "answer": "</td><img src=x>"},
    *({"question": f"{n} + 1?", "answer": f"{n + 1}。"} for n in range(8)),
]
SECTIONS = [
    "Summary", "Scores", "Questions and answers", "Training", "Loss", "Model", "Data and tokenizer",
    "Machine", "Commands", "Settings",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    """A project with a report about pretraining, more pretraining from there, and SFT, which was resumed."""
    project = Project(tmp_path_factory.mktemp("report"))
    project.furnish(tiny_data)
    project.questions = project.root / "my.jsonl"
    project.questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    small = ["--set", "eval_interval=3", "--set", "log_interval=2"]
    for command in (
        ["pretrain", *small],
        ["pretrain", *small, "--set", "from_checkpoint=auto", "--set", "max_steps=5"],
        ["sft", *small, "--set", "max_steps=3"],
        ["sft", *small, "--resume"],
    ):
        done = project.run("train.py", "-t", *command)
        assert done.returncode == 0, done.stderr
    project.done = report(project)
    assert project.done.returncode == 0, project.done.stderr
    return project


def report(project, *args):
    return project.run("evaluate.py", "--report", "--tasks", project.questions, "--device", "cpu", *args)


class Page(html.parser.HTMLParser):
    """texts: all words; tables: {name: [[text of each cell] of each row]}; attributes: of all elements."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.tables, self.attributes, self.tags = [], {}, [], []
        self.texts, self.rows, self.inside = "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        found = dict(attributes)
        if tag == "div" and found.get("role") == "region":
            self.rows = self.tables.setdefault(found["aria-label"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.inside = tag if tag in ("th", "td", "h2", "style") else self.inside

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, text):
        self.texts += text * (self.inside != "style")
        if self.inside in ("th", "td"):
            self.rows[-1][-1] += text
        if self.inside == "h2":
            self.headings.append(text)

    def table(self, start):
        """{first cell: the others} of the table whose name starts like this."""
        [rows] = [rows for name, rows in self.tables.items() if name.startswith(start)]
        return {row[0]: row[1:] for row in rows}


def page_of(project, folder=None):
    folder = folder or next((project.root / "checkpoint" / "report").iterdir())
    return Page((folder / "report.html").read_text("utf-8"))


def copy(made, tmp_path):
    """Another project with the same runs, in which a test may remove what it likes."""
    other = Project(tmp_path)
    for name in ("checkpoint", "dataset", "config"):
        shutil.copytree(made.root / name, other.root / name, dirs_exist_ok=True)
    for path in [made.questions, *made.root.glob("train_2*")]:
        shutil.copy(path, other.root)
    shutil.rmtree(other.root / "checkpoint" / "report")
    other.questions = other.root / "my.jsonl"
    return other


# ---- what is in it -----------------------------------------------------------------------------------------


def test_all_parts_are_there_in_both_files(made):
    page = page_of(made)
    assert page.headings == SECTIONS
    folder = next((made.root / "checkpoint" / "report").iterdir())
    assert folder.name == made.checkpoints("sft")[RUN["max_steps"]].stem
    markdown = (folder / "report.md").read_text("utf-8")
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == SECTIONS
    charts = re.findall(r"^!\[Chart of .* steps .*\]\((.*)\)$", markdown, re.MULTILINE)
    assert charts == ["pretrain_1.svg", "pretrain_2.svg", "sft.svg"] and page.tags.count("img") == 3
    assert all((folder / chart).read_bytes().startswith(b"<?xml") for chart in charts)
    # Every cell of the page is in the Markdown, too.
    plain = re.sub(r"\\(.)", r"\1", markdown)
    for rows in page.tables.values():
        assert all(" ".join(cell.split("\n")) in plain for row in rows for cell in row)


def test_costs_are_those_of_the_logs(made):
    costs = page_of(made).table("training")
    assert costs[""] == ["pretrain 1", "pretrain 2", "sft", "sum"]
    logs = [[json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in sorted(made.root.glob("train_2*.metrics.jsonl"))]  # fmt: skip
    assert costs["run"][:3] == [events[0]["run"] for events in logs]
    assert costs["started from"] == ["a new model", "pretrain 1, step 6", "pretrain 2, step 5", ""]
    assert costs["steps"] == ["6", "5", "6", "17"]
    per_step = RUN["batch_size"] * MODEL["block_size"]
    assert costs["tokens"][:2] == [f"{6 * per_step:,}", f"{5 * per_step:,}"]
    flops = [6 * per_step * logs[0][0]["flops_per_token"], 5 * per_step * logs[1][0]["flops_per_token"]]
    assert [float(cell) for cell in costs["training FLOPs"][:2]] == pytest.approx(flops, rel=1e-3)
    sums = [float(cell) for cell in costs["training FLOPs"]]
    assert sums[3] == pytest.approx(sum(sums[:3]), rel=1e-3)
    losses = [event["loss"] for event in logs[2] if event["event"] == "val"]
    assert costs["validation loss, last"][2] == f"{losses[-1]:.4f} (step 6)"
    assert costs["validation loss, lowest"][2].startswith(f"{min(losses):.4f} ")


def engine_files(project):
    """The last checkpoint of each run, in order."""
    files = {}
    for path in sorted((project.root / "checkpoint").glob("*.pt"), key=lambda p: int(p.stem.split("_")[-1])):
        files[path.stem.split("_step")[0].split("_", 1)[1]] = path
    return [files[run] for run in sorted(files)]


def test_scores_are_those_on_disk(made):
    footers = {}
    for path in (made.root / "checkpoint" / "evaluation").glob("*.jsonl"):
        first, *_, last = map(json.loads, path.read_text("utf-8").splitlines())
        footers[first["about"]["run"]] = last
    assert len(footers) == 3
    [(_, cells)] = [row for row in page_of(made).table("scores").items() if row[0].endswith("my.jsonl")]
    expected = [f"{100 * footers[run]['score']:.1f} % ± {100 * footers[run]['standard_error']:.1f}"
                for run in sorted(footers)]  # fmt: skip
    assert cells[:3] == expected and cells[4:] == ["exact", "9"]


def test_data_model_machine_and_commands(made):
    page = page_of(made)
    meta = json.loads((made.root / "dataset" / "prepared" / "sft_train.json").read_text("utf-8"))
    size, bytes_a_token = page.table("data")["dataset/prepared/sft_train.bin"][1:3]
    assert size == f"{meta['n_documents']:,} documents, {meta['n_tokens']:,} tokens"
    assert bytes_a_token == f"{meta['n_bytes'] / meta['n_tokens']:.3f}"
    assert page.table("model")["block_size"] == ["32"] and page.table("machine")["device"] == ["cpu"]
    assert page.table("all keys")["max_steps"] == ["6", "5", "6"]
    typed = "python train.py -t sft --set eval_interval=3 --set log_interval=2"
    assert f"{typed} --set max_steps=3\n{typed} --resume\n" in page.texts
    assert f"python evaluate.py --report --tasks '{made.questions}' --device cpu" in page.texts


# ---- safe to open ------------------------------------------------------------------------------------------


def test_nothing_is_run_or_loaded_and_texts_are_only_texts(made):
    page = page_of(made)
    assert not {"script", "iframe", "link", "object", "form"} & {*page.tags}
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert len(links) == 3 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    [policy] = [v for n, v in page.attributes if n == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src" not in policy
    assert page.table("questions")[HOSTILE + "\ufffd\ufffd"][-1] == "</td><img src=x>"
    markdown = next((made.root / "checkpoint" / "report").iterdir()).joinpath("report.md").read_text("utf-8")
    assert "<script" not in re.sub(r"\\<", "", markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("| \\<script")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_a_model_without_a_log_whose_answers_are_escaped(command, tmp_path, monkeypatch):
    words = "<b>&\x1b[0m"
    (tmp_path / "my.jsonl").write_text(json.dumps({"question": "你", "answer": words}) + "\n", "utf-8")
    tokenizer = CharTokenizer.train([TEXT + words])
    dataclasses.replace(polite(tokenizer), train_config={"from_checkpoint": "auto"}).save()
    monkeypatch.setattr(
        "evaluation.runner.answer_greedily",
        lambda model, prompts, *_, **__: [(tokenizer.encode(words).tolist(), True) for _ in prompts],
    )
    done = command("--report", "--tasks", "my.jsonl", "--out", "页 page", main=evaluate.main)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "页 page" / "report.html").read_text("utf-8")
    assert "What sft 20260102_030405 started from is not recorded" in text  # and not guessed
    assert "There is no log of sft 20260102_030405" in text
    assert "&lt;b&gt;&amp;\ufffd[0m" in text and "<b>" not in text and "\x1b" not in text


# ---- what is missing ---------------------------------------------------------------------------------------


def test_what_is_gone_is_named_and_what_was_measured_is_added_up(made, tmp_path):
    project = copy(made, tmp_path)
    first, second, _ = engine_files(project)
    second.unlink()
    for path in project.root.glob(f"train_{first.stem[9:24]}*"):
        path.unlink()
    *_, sft = sorted(project.root.glob("train_2*.metrics.jsonl"))
    joules, total, lines = 0.0, 0.0, [json.loads(line) for line in sft.read_text("utf-8").splitlines()]
    for line in lines:  # as a machine that tells would have written them: each start counts anew
        if line["event"] == "start":
            joules, line["energy_of"] = 0.0, ["package-0", "GPU"]
        if line["event"] == "train":
            joules, total = joules + 1800.0, total + 1800.0
            line["energy_joules"] = joules
    assert sum(line["event"] == "start" for line in lines) == 2
    sft.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    done = report(project)
    assert done.returncode == 0, done.stderr
    page = page_of(project)
    assert f"started from checkpoint/{second.name}, which cannot be scored" in page.texts
    assert f"There is no log of pretrain {first.stem[9:24]}" in page.texts
    costs = page.table("training")
    assert costs["steps"] == ["not recorded", "5", "6", "more than 11"]
    spent = f"{total / 3600:g} Wh"
    assert costs["energy"] == ["not recorded", "not recorded", spent, f"more than {spent}"]
    assert page.table("scores")["task"] == ["pretrain 1", "sft", "base rate", "metric", "examples"]


def test_a_run_that_branches_off_started_from_a_checkpoint(train):
    train("pretrain", save_interval=2, max_steps=4)
    first = train.checkpoints()[2]
    assert train("pretrain", "--resume", first, max_steps=5).returncode == 0
    state = engine.checkpoint.load(train.checkpoints()[5])
    assert state.train_config["from_checkpoint"] == f"checkpoint/{first.name}"


def test_mistakes(command, tmp_path):
    def sentence(*args):
        done = command(*args, main=evaluate.main)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "no model in checkpoint/" in sentence("--report")
    assert "--out is the folder for --report" in sentence("--out", "x")
    (tmp_path / "x").write_text("")
    assert "x is not a folder" in sentence("--report", "--out", "x")
    assert "--report is about one model" in sentence("--report", "--compare", "x", "x")


# ---- a browser ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_scrolled_sideways(made, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda line: wrong.append(line.text))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url)
    )
    [folder] = (made.root / "checkpoint" / "report").iterdir()
    page.goto((folder / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        "[...document.querySelectorAll('.box')].map(box => box.scrollWidth - box.clientWidth)"
    )
    assert width > 360 or max(boxes) > 0  # on a phone, wide tables scroll in their boxes
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert wrong == []
    context.close()
