"""``python -m loraplex_engine.simulation``: a `Question` as JSON on stdin, its answer as JSON on stdout.

A question that cannot be answered ends the program with exit code 2 and ``{"error": {"kind": ..., "message": ...}}``.
"""

from __future__ import annotations

import json
import sys

from loraplex_engine.simulation.question import QuestionError, answer, read_question
from loraplex_engine.simulation.shapes import ShapeError
from loraplex_engine.simulation.trace import TraceError


def main() -> int:
    """Answer the question on stdin."""
    try:
        answered = answer(read_question(json.load(sys.stdin)))
    except (QuestionError, ShapeError, TraceError) as error:
        json.dump({"error": {"kind": type(error).__name__, "message": str(error)}}, sys.stdout)
        return 2
    except json.JSONDecodeError as error:
        json.dump({"error": {"kind": "QuestionError", "message": f"no JSON: {error}"}}, sys.stdout)
        return 2
    json.dump(answered, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
