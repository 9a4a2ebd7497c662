"""Questions on stdin → decode steps of onnxruntime-genai, timed; runs in an environment that has it.

A line is {"prompt": ids, "tokens": count, "search": options}; the answer to it is [tokens, seconds of each].
"""

import json
import sys
import time
from itertools import pairwise

import onnxruntime_genai as genai


def main() -> None:
    folder, threads = sys.argv[1:]
    config = genai.Config(folder)
    options = {"intra_op_num_threads": int(threads)}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    print(json.dumps(genai.__version__), flush=True)
    for line in sys.stdin:
        print(json.dumps(block(model, tokenizer, **json.loads(line))), flush=True)


def block(model, tokenizer, prompt, tokens, search):
    """Decode so many tokens to text, not ending before.  No top_p: greedy."""
    length = len(prompt) + tokens
    chosen = {"do_sample": True, "top_k": 0, "random_seed": 0, **search} if search else {"do_sample": False}
    params = genai.GeneratorParams(model)
    params.set_search_options(min_length=length, max_length=length, **chosen)
    generator, text = genai.Generator(model, params), tokenizer.create_stream()
    generator.append_tokens(prompt)
    found, times = [], [time.perf_counter()]
    for _ in range(tokens):
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        text.decode(token)
        found.append(token)
        times.append(time.perf_counter())
    return found, [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    main()
