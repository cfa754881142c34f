"""A server in a thread, on a free port of this machine, for tests."""

import contextlib
import json
import threading
import time

import httpx

from redco_like.server.app import create_app
from redco_like.server.process import Server, bind
from redco_like.text import Text


class Running:
    """A server that runs: its client, its application, its engine."""

    def __init__(self, engine, app, server, base_url):
        self.engine, self.app, self.server, self.base_url = engine, app, server, base_url
        self.service = app.state.service
        self.client = httpx.Client(base_url=base_url, timeout=30)

    def drain(self):
        self.server._loop.call_soon_threadsafe(self.server.drain)

    def wait_idle(self, seconds=5.0):
        """Wait until nothing runs and nobody waits."""
        until = time.monotonic() + seconds
        while not (self.engine.idle and not self.service.worker.open):
            assert time.monotonic() < until, (self.engine.stats(), self.service.worker.open)
            time.sleep(0.005)

    def metrics(self):
        """Values by their line's beginning."""
        lines = self.client.get("/metrics").text.splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


@contextlib.contextmanager
def serving(engine, *, text=None, name="fake", grace_seconds=5.0, **options):
    """Run a server for as long as the context lasts."""
    app = create_app(engine, text or Text.of_bytes(eos=engine.eos), name=name, **options)
    sock = bind("127.0.0.1", 0)
    server = Server(app, grace_seconds=grace_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.005)
    running = Running(engine, app, server, f"http://127.0.0.1:{sock.getsockname()[1]}")
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive(), "the server does not stop"


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_folder(folder, *, length=256):
    """A folder as Hugging Face has it: a Llama of two layers with random weights, and a tokenizer trained on a page."""
    import jax
    from tiny_architectures import make_params, tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from redco_like.models import build_model, save

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([__doc__, TEMPLATE, "Once upon a time there was a hello in the world"] * 4, trainer)
    files = folder / "tokenizer"
    files.mkdir(parents=True)
    tokenizer.save(str(files / "tokenizer.json"))
    record = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (files / "tokenizer_config.json").write_text(json.dumps(record))
    config = tiny("llama-3-8b", max_length=length, vocab=tokenizer.get_vocab_size())
    model = build_model(config, dtype="float32")
    save(folder / "tiny", model, jax.device_get(make_params(model.init_fn)), tokenizer_from=files)
    return folder / "tiny"
