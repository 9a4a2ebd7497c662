"""A prompt → its continuation, printed as it comes.

python examples/stream.py build/demo/onnx-fp16 "The capital of France is"
"""

import sys

from mistral_trt.runtime import Engine, SamplingParams


def main() -> None:
    folder, prompt = sys.argv[1:]
    params = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, seed=1)
    with Engine.load(folder) as engine:
        for piece in engine.stream(prompt, params):
            print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
