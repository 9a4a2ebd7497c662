"""Prompts, one a line → a line of JSON for each, all of them decoded together.

python examples/batch.py build/demo/onnx-fp16 < prompts.txt
"""

import json
import sys

from mistral_trt.runtime import Engine, SamplingParams


def main() -> None:
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with Engine.load(sys.argv[1]) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=64))
    for prompt, output in zip(prompts, outputs, strict=True):
        print(json.dumps({"prompt": prompt, "text": output.text, "finish_reason": output.finish_reason}))


if __name__ == "__main__":
    main()
