"""A chat whose turns feed only what is new, and which goes on tomorrow: it is saved to a file at its end.

python examples/chat_session.py build/demo/onnx-fp16 chat.session     # a line on stdin is a turn
"""

import sys
from pathlib import Path

from mistral_trt.runtime import Engine, SamplingParams


def main() -> None:
    folder, file = sys.argv[1], Path(sys.argv[2])
    params = SamplingParams(max_tokens=200, temperature=0.7, top_p=0.9, seed=1)
    with Engine.load(folder) as engine:
        session = engine.restore_session(file) if file.exists() else engine.session()
        for line in sys.stdin:
            turn = [{"role": "user", "content": line.strip()}]
            for piece in session.stream(messages=turn, params=params):
                print(piece.text, end="", flush=True)
            print()
        session.save(file)


if __name__ == "__main__":
    main()
