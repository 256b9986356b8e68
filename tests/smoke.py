"""What must work where spanguard is installed from its wheel, and nothing else of the checkout.

Run as a program, in an empty folder: it records a trace into a database there and reads it back.
"""

from __future__ import annotations

from importlib import metadata, resources

import mlflow

import spanguard
from spanguard import traced, traced_span


@traced
def double(number: int) -> int:
    return 2 * number


def main() -> None:
    mlflow.set_tracking_uri("sqlite:///smoke.db")
    with traced_span("smoke") as root:
        assert double(21) == 42
    assert spanguard.flush(60)
    trace = mlflow.MlflowClient().get_trace(root.trace_id)
    assert [span.name for span in trace.data.spans] == ["smoke", "double"]
    assert {span.status.status_code.value for span in trace.data.spans} == {"OK"}
    assert metadata.version("spanguard") == spanguard.__version__
    assert resources.files(spanguard).joinpath("py.typed").is_file()
    print(f"spanguard {spanguard.__version__} from {spanguard.__file__} works")


if __name__ == "__main__":
    main()
