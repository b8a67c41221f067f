"""The API of models that hear, as its clients see it: recordings as files, in pieces, in batches of what waits."""

import contextlib
import dataclasses
import functools
import io
import json
import threading

import jax
import numpy as np
import openai
import pytest
import soundfile
from serving import TOKENIZER
from test_api import ask, client, listening
from test_scheduler import compilations

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.data.characters import Characters
from jaxcost.data.sounds import read_sound, windows
from jaxcost.data.spectrogram import SAMPLE_RATE, Spectrogram
from jaxcost.models.config import AudioConfig, EncoderConfig, HeadConfig, ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.api.app import create_app
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.kinds import model_of_kind
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.speech import DictatedModel, SpelledModel
from jaxcost.serving.batches import Batcher, BatchesConfig
from jaxcost.serving.ctc import Heard, greedy_decode
from jaxcost.serving.slots import SlotsConfig
from jaxcost.serving.sources import SourceScheduler, SourceSlots, never
from jaxcost.serving.speech import Instructions
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

BASE = ModelConfig(
    vocab_size=384,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_width=48,
    norm="layer",
    position="learned",
    max_length=32,
)
DICTATED = dataclasses.replace(
    BASE,
    audio=AudioConfig(6, (24, 32), (3, 3), (1, 2), padded=True),
    encoder=EncoderConfig(1, max_length=13, start=300),
)
SPELLED = dataclasses.replace(
    BASE,
    vocab_size=0,
    causal=False,
    position="none",
    max_length=3000,
    audio=AudioConfig(1, (12, 16), (10, 3), (5, 2), norm="each", projection="normed", position_kernel=6,
                      position_groups=4),
    head=HeadConfig(outputs=27, bias=True),
)  # fmt: skip
TOLD = Instructions(
    300, {"en": 301, "de": 302}, 303, 304, 305, 306, never=(300, 303, 304, 305, 97), not_first=(104, 105, 106)
)
CHARACTERS = Characters(("", " ", *(chr(97 + i) for i in range(25))), 0)
LONGEST = 26 * 160
"""Samples that the decoder's encoder hears at once."""
SLOTS = SlotsConfig(slots=4, decode_slots=(4,), decode_lengths=(1000,))


@functools.cache
def params(config):
    made = jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(1))
    if config is SPELLED:
        return made
    # Sharper, so that every recording has an answer of its own, and never an id that no text has.
    kernel = (6 * made["unembed"]["kernel"]).at[:, TOKENIZER.vocab_size :].set(0)
    sharper = jax.tree.map(lambda a: 4 * a, made["layers"]["cross_attention"])
    return {**made, "unembed": {"kernel": kernel}, "layers": {**made["layers"], "cross_attention": sharper}}


@functools.cache
def slots():
    """Shared by all tests of a process, as `heard`."""
    own = never(params(DICTATED), TOLD.never, 384)
    return SourceSlots(Transformer(DICTATED), own, SLOTS, prompt_tokens=(8,), not_first=TOLD.not_first)


@functools.cache
def heard():
    return Heard(Transformer(SPELLED), params(SPELLED), BatchesConfig(lengths=(100, 300), rows=(1, 4)))


def make(kind, queue=256):
    vocabulary, limits = Vocabulary(TOKENIZER), SchedulerConfig(queue)
    if kind == "dictated":
        return DictatedModel("small", vocabulary, SourceScheduler(slots(), vocabulary.decode, limits), TOLD)
    return SpelledModel("small", vocabulary, Batcher(heard(), limits), CHARACTERS)


@contextlib.contextmanager
def serving(model, **options):
    """A server of a model at a free port."""
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    metrics.watch(model.worker)
    with listening(create_app(model, metrics, **options)) as port:
        yield port
    assert not model.healthy


@pytest.fixture(scope="module")
def dictated():
    with serving(make("dictated")) as port:
        yield port


@pytest.fixture(scope="module")
def spelled():
    with serving(make("spelled")) as port:
        yield port


def sound(seconds, seed=0, rate=SAMPLE_RATE):
    """Tones that come and go, float32 (samples,)."""
    random, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * (f * time + a)) * np.sin(9 * time + a) for f, a in random.uniform(0, 900, (4, 2))]
    return (0.2 * np.sum(tones, axis=0)).astype(np.float32)


def file(samples, rate=SAMPLE_RATE, format="WAV", subtype=None):
    made = io.BytesIO()
    soundfile.write(made, samples, rate, format=format, subtype=subtype)
    return made.getvalue()


@functools.cache
def likeliest():
    def made(own, tokens_1T, source_1S):
        hidden_1TD, _ = Transformer(DICTATED).apply({"params": own}, tokens_1T, source_BS=source_1S)
        return logits(DICTATED, own, hidden_1TD[0])

    return jax.jit(made)


def dictation(samples, prompt):
    """What the decoder says of a piece by itself, from the library, without a cache."""
    seen = Spectrogram(6, LONGEST / SAMPLE_RATE).map({"audio": samples})["spectrogram"][None]
    tokens, count = np.zeros((1, 32), np.int32), len(prompt)
    tokens[0, :count] = prompt
    for place in range(count, 32):
        found = np.array(likeliest()(params(DICTATED), tokens, seen)[place - 1])
        found[[*TOLD.never, *(TOLD.not_first if place == count else ())]] = -np.inf
        tokens[0, place] = found.argmax()
        if tokens[0, place] in TOKENIZER.stop_ids:
            return TOKENIZER.decode(tokens[0, count:place])
    return TOKENIZER.decode(tokens[0, count:])


def spelling(samples):
    """What the model of characters hears in a piece by itself, unpadded."""
    audio = ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))[None]
    labels, [count] = labelled()(params(SPELLED), audio)
    return CHARACTERS.text(np.asarray(labels)[0, :count].tolist())


@functools.cache
def labelled():
    def made(own, audio):
        hidden, _ = Transformer(SPELLED).apply({"params": own}, audio)
        return greedy_decode(logits(SPELLED, own, hidden))

    return jax.jit(made)


def post(port, content, path="transcriptions", **fields):
    """Status and body of a form with a file, and with any fields whatever their kind."""
    edge = b"edge-of-a-part"
    parts = [b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % (k.encode(), str(v).encode())
             for k, v in fields.items()]  # fmt: skip
    parts += [b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + content]
    body = b"".join(b"--" + edge + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + edge + b"--\r\n"
    kind = {"Content-Type": f"multipart/form-data; boundary={edge.decode()}"}
    status, _, answer = ask(port, f"/v1/audio/{path}", body, kind)
    return status, answer


# ---- A decoder of speech ----


def test_openai_s_client_gets_what_the_decoder_says_alone(dictated, tmp_path):
    path, samples = tmp_path / "said.wav", sound(0.2)
    path.write_bytes(file(samples))
    samples = read_sound(path.read_bytes(), SAMPLE_RATE, 9)
    ask_for, want = client(dictated).audio.transcriptions.create, dictation(samples, [300, 301, 303, 305]).strip()
    with open(path, "rb") as opened:
        got = ask_for(file=opened, model="small", language="en")
    assert got.text == want and len(want) > 4 and got.usage.seconds == 1 and got.usage.cost_usd > 0
    plain = ask_for(file=path, model="small", language="en", response_format="text")
    assert plain == want + "\n"
    german = ask_for(file=path, model="small", language="de", prompt="so it goes").text
    before = [306, *TOKENIZER.encode(" so it goes").tolist()]
    assert german == dictation(samples, [*before, 300, 302, 303, 305]).strip() != want
    drawn = [ask_for(file=path, model="small", language="en", temperature=1, extra_body={"seed": seed}).text
             for seed in (1, 1, 2)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(openai.BadRequestError, match="does not tell which language"):
        client(dictated).audio.translations.create(file=path, model="small")


def test_a_long_recording_is_heard_in_pieces(dictated):
    content = file(sound(1.0))
    samples = read_sound(content, SAMPLE_RATE, 9)
    pieces = windows(samples, LONGEST, SAMPLE_RATE)
    assert len(pieces) >= 4 and sum(map(len, pieces)) == len(samples)
    status, text = post(dictated, content, language="en", response_format="verbose_json", temperature=0)
    found, want = json.loads(text), [dictation(piece, [300, 301, 303, 305]) for piece in pieces]
    assert status == 200 and [segment["text"] for segment in found["segments"]] == want
    assert found["text"] == " ".join(piece.strip() for piece in want if piece.strip())
    assert (found["task"], found["language"], found["duration"]) == ("transcribe", "en", 1.0)
    assert found["segments"][1]["start"] == pytest.approx(len(pieces[0]) / SAMPLE_RATE)
    assert found["segments"][-1]["end"] == 1.0


def test_many_clients_get_what_each_gets_alone_and_nothing_is_compiled(dictated):
    contents = [file(sound(0.1 + 0.05 * i, seed=i)) for i in range(4)]
    want = [dictation(read_sound(content, SAMPLE_RATE, 9), [300, 301, 303, 305]).strip() for content in contents]
    assert len(set(want)) == 4
    found = {}

    def one(i):
        found[i] = json.loads(post(dictated, contents[i % 4], language="en")[1])["text"]

    with compilations() as compiled:
        threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not compiled and found == {i: want[i % 4] for i in range(16)}


@pytest.mark.slow
def test_the_language_is_what_the_model_says_first(tmp_path):
    """A model that says German first of a recording is told to translate it from German."""
    own, content = params(DICTATED), file(sound(0.1), format="FLAC")
    samples = read_sound(content, SAMPLE_RATE, 9)
    seen = Spectrogram(6, LONGEST / SAMPLE_RATE).map({"audio": samples})["spectrogram"][None]
    states, _ = jax.jit(Transformer(DICTATED).apply)({"params": own}, np.array([[300]]), source_BS=seen)
    hidden = np.asarray(states[0, 0])
    kernel = own["unembed"]["kernel"].at[:, 302].set(1000 * hidden / (hidden @ hidden))
    made = SourceSlots(Transformer(DICTATED), own | {"unembed": {"kernel": kernel}}, SLOTS, prompt_tokens=(4,))
    vocabulary = Vocabulary(TOKENIZER)
    with serving(DictatedModel("small", vocabulary, SourceScheduler(made, vocabulary.decode), TOLD)) as port:
        found = client(port).audio.translations.create(
            file=("a.flac", content), model="small", response_format="verbose_json"
        )
    assert (found.language, found.task) == ("de", "translate")


# ---- A model of characters ----


def test_characters_are_those_of_each_recording_alone_and_nothing_is_compiled(spelled):
    contents = [file(sound(0.05 + 0.1 * (i % 2), seed=i)) for i in range(4)]
    want = [spelling(read_sound(content, SAMPLE_RATE, 9)) for content in contents]
    assert len(set(want)) == 4 and all(want)
    found = {}

    def one(i):
        found[i] = json.loads(post(spelled, contents[i % 4])[1])["text"]

    with compilations() as compiled:
        threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not compiled and found == {i: want[i % 4] for i in range(16)}
    metrics = ask(spelled, "/metrics", method="GET")[2].decode()
    assert 'vllm:request_success_total{finished_reason="stop"' in metrics


def test_files_of_any_kind_and_rate_and_recordings_of_any_length(spelled):
    long = sound(0.25, rate=8000)
    both = np.stack([long, 0.5 * long], axis=1)
    content = file(both, 8000, "FLAC")
    samples = read_sound(content, SAMPLE_RATE, 9)
    assert len(samples) == 4000
    pieces = windows(samples, heard().longest, SAMPLE_RATE)
    want = " ".join(filter(None, map(spelling, pieces)))
    got = client(spelled).audio.transcriptions.create(file=("a.flac", content), model="small")
    assert len(pieces) > 1 and got.text == want
    assert post(spelled, file(np.zeros(3, np.float32)))[0] == 200


# ---- What is refused ----


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        (b"", {}, "The file is empty"),
        (b"no sound at all" * 99, {}, "cannot be read as sound"),
        (file(sound(0.2))[:30], {}, "cannot be read as sound"),
        (file(np.zeros(0, np.float32)), {}, "has no sound in it"),
        (file(sound(0.1), 500), {}, "has 500 samples a second"),
        (file(sound(3.0)), {}, "lasts 3 s, more than 2 s"),
        (file(np.full(99, np.nan), subtype="FLOAT"), {}, "samples that are no numbers"),
        (file(np.full(99, 3e38), subtype="FLOAT"), {}, "samples that are no numbers, or beyond"),
        (file(sound(0.1)), {"temperature": "nan"}, "temperature"),
        (file(sound(0.1)), {"temperature": "2"}, "temperature"),
        (file(sound(0.1)), {"response_format": "srt"}, "response_format"),
        (file(sound(0.1)), {"model": "other"}, "There is no model 'other'"),
        (file(sound(0.1)), {"stream": "true"}, "stream is not supported"),
        (file(sound(0.1)), {"timestamp_granularities[]": "word"}, "timestamp_granularities is not supported"),
        (file(sound(0.1)), {"language": "xx"}, "give one of de, en"),
        (file(sound(0.1)), {"deadline_seconds": "1e-9"}, "deadline"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_heard_is_refused_in_openai_s_form(strict, content, fields, said):
    status, text = post(strict, content, **{"language": "en"} | fields)
    error = json.loads(text)["error"]
    assert 400 <= status < 500 and set(error) == {"message", "type", "param", "code"} and said in error["message"]


@pytest.fixture(scope="module")
def strict():
    with serving(make("dictated"), config=ApiConfig(audio_seconds=2.0, audio_bytes=300_000)) as port:
        yield port


def test_bodies_that_are_too_large_or_no_forms_are_refused(strict):
    status, text = post(strict, bytes(400_000))
    assert status == 413 and "larger than 300000 bytes" in json.loads(text)["error"]["message"]
    assert ask(strict, "/v1/audio/transcriptions", {"file": "a", "model": "small"})[0] == 400
    assert (
        ask(strict, "/v1/audio/transcriptions", b"--x\r\nnonsense", {"Content-Type": "multipart/form-data"})[0] == 400
    )
    assert ask(strict, "/v1/completions", {"prompt": "a"})[0] == 400


def test_a_model_of_characters_refuses_what_it_does_not_do(spelled):
    content = file(sound(0.1))
    for path, fields, said in (
        ("translations", {}, "does not translate it"),
        ("transcriptions", {"language": "en"}, "leave language out"),
        ("transcriptions", {"temperature": "0.5"}, "leave temperature out"),
        ("transcriptions", {"prompt": "a"}, "leave prompt out"),
    ):
        status, text = post(spelled, content, path, **fields)
        assert status == 400 and said in json.loads(text)["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="writes down what it hears, and does not continue texts"):
        client(spelled).completions.create(model="small", prompt="a")


def test_overload_is_refused_and_passes():
    model, found, content = make("dictated", queue=1), [], file(sound(0.2))
    with serving(model) as port:
        threads = [threading.Thread(target=lambda: found.append(post(port, content, language="en")[0]))
                   for _ in range(16)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429} and model.worker.num_waiting == 0
        assert post(port, content, language="en")[0] == 200


# ---- Checkpoints ----


def test_slots_without_room_for_an_answer_are_refused_before_anything_is_compiled(tmp_path):
    told = {"lang_to_id": {"<|en|>": 301}, "task_to_id": {"transcribe": 303}, "no_timestamps_token_id": 305}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    few, own = dataclasses.replace(SLOTS, max_length=9), params(DICTATED)
    with compilations() as compiled, pytest.raises(ValueError, match="set engine.max_length to at least 10"):
        model_of_kind("small", Transformer(DICTATED), own, TOKENIZER, tmp_path, slots=few)
    assert not compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dictated", "spelled"])
def test_a_checkpoint_s_own_files_say_what_its_outputs_mean(kind, tmp_path):
    config, options = (DICTATED, {"slots": SLOTS}) if kind == "dictated" else (SPELLED, {})
    codes = {"<|en|>": 301, "<|de|>": 302}
    told = {"lang_to_id": codes, "task_to_id": {"transcribe": 303, "translate": 304}, "no_timestamps_token_id": 305}
    told |= {"prev_sot_token_id": 306, "suppress_tokens": [97], "begin_suppress_tokens": [104]}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    characters = {"<pad>": 0, "|": 1, **{chr(97 + i): i + 2 for i in range(25)}}
    (tmp_path / "vocab.json").write_text(json.dumps(characters))
    batches = BatchesConfig(lengths=(100,), rows=(1,))
    model = model_of_kind("small", Transformer(config), params(config), TOKENIZER, tmp_path, batches=batches, **options)
    model.close()
    if kind == "spelled":
        assert model.characters == CHARACTERS
        return
    assert model.instructions == dataclasses.replace(
        TOLD, never=tuple(sorted({97, 300, 303, 304, *range(305, 384)})), not_first=(104,)
    )
