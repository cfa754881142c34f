"""Talk to a model in a Hugging Face folder; answers appear token by token.

    python examples/chat.py                                    # the small model of examples/finetune_lora.py
    python examples/chat.py path/to/model --temperature 0.7
    python examples/chat.py --prompt "What is the capital of Japan?"

Without a folder it takes what examples/finetune_lora.py has written, and runs that first if it has not run yet. Where
the input is no terminal, each line of it is a question of its own.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import pathlib
import sys
import time

import finetune_lora

import redco_like as rl
from redco_like import models
from redco_like.text import Text

TUNED = finetune_lora.FOLDER / "tuned"


def answer(engine, text, messages, settings):
    """Print the answer as it comes; return it, with the number of tokens and the seconds they took."""
    prompt, stream, pieces = text.encode_chat(messages), text.stream(), []
    start, count = time.perf_counter(), 0
    engine.submit(prompt, settings)
    while not engine.idle:
        for event in engine.step():
            count += len(event.tokens)
            pieces.append(stream.add(event.tokens))
            print(pieces[-1], end="", flush=True)
    pieces.append(stream.end())
    print(pieces[-1])
    return "".join(pieces).strip(), count, time.perf_counter() - start


def questions(given):
    """The prompts that were given, the lines of the input, or what is typed."""
    if given:
        yield from given
    elif not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
    else:
        try:
            while line := input("> ").strip():
                yield line
        except (EOFError, KeyboardInterrupt):
            print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=TUNED)
    parser.add_argument("--prompt", action="append", help="ask this and end; may be given several times")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and answer together, at most")
    options = parser.parse_args()
    if options.folder == TUNED and not TUNED.exists():
        finetune_lora.main()
    loaded, text = models.load(options.folder, plan="auto"), Text.from_folder(options.folder)
    length = min(options.length, loaded.config.max_length)
    engine = rl.Engine(loaded.model, loaded.params, length=length, eos=text.eos)
    print(f"compiled {len(engine.warm_up(None))} programs\n")
    together = sys.stdin.isatty() and not options.prompt
    messages = []
    for question in questions(options.prompt):
        messages = [*(messages if together else []), {"role": "user", "content": question}]
        while len(text.encode_chat(messages)) > length // 2 and len(messages) > 1:
            messages = messages[2:]  # the oldest question and its answer
        if not together:
            print(f"> {question}")
        room = length - len(text.encode_chat(messages))
        if room < 1:
            print(f"that is more than the {length} tokens that the model reads\n")
            continue
        settings = rl.SamplingParams(max_tokens=min(options.max_tokens, room), temperature=options.temperature)
        said, count, seconds = answer(engine, text, messages, settings)
        print(f"  ({count} tokens in {seconds:.2f} s)\n")
        messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
