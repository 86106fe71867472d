"""What every other room may use; it imports none of them (but config/schema.py)."""

from common.packages import explain_imports

explain_imports()
