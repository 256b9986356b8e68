"""The callables of callables.py, traced: its source under another name."""

from pathlib import Path

_source = Path(__file__).with_name("callables.py")
exec(compile(_source.read_text(encoding="utf-8"), str(_source), "exec"))
