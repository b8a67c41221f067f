"""What the server writes down of recordings is what transformers does, from small random checkpoints that it saves."""

import io
import json

import numpy as np
import pytest
from serving import TOKENIZER
from test_api import client
from test_api_speech import file, serving, sound

from jaxcost.conversion import KEPT, import_checkpoint
from jaxcost.data.pretrained import write_tokenizer
from jaxcost.data.sounds import read_sound
from jaxcost.serving.api.kinds import model_of_kind
from jaxcost.serving.batches import BatchesConfig
from jaxcost.serving.slots import SlotsConfig
from jaxcost.session import load_run

pytestmark = pytest.mark.oracles

RATE = 16_000
TOLD = {
    "lang_to_id": {"<|en|>": 301, "<|de|>": 302},
    "task_to_id": {"transcribe": 303, "translate": 304},
    "no_timestamps_token_id": 305,
    "prev_sot_token_id": 300,
    "is_multilingual": True,
    "suppress_tokens": [97, 98, *range(257, 300), 300, 303, 304, 305],
    "begin_suppress_tokens": [99, 256],
    "decoder_start_token_id": 300,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "max_length": 40,
}


def saved(model, folder, *parts):
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn_like(parameter) * 1.2 * fan**-0.5)
            if path.endswith(("layer_norm.weight", "original0")):
                parameter.add_(1)
            if "encoder_attn" in path:
                parameter.mul_(3)
    for part in (model.eval(), *parts):
        part.save_pretrained(folder)
    return model


def served(folder, run):
    """The model of a checkpoint, as scripts/serve.py makes it."""
    import_checkpoint(folder, run, quiet=True)
    session, params, _ = load_run(run)
    few = {"slots": SlotsConfig(slots=2, decode_lengths=(1000,)), "batches": BatchesConfig(lengths=(99,), rows=(1, 2))}
    return model_of_kind("small", session.model, params, session.tokenizer, run / KEPT, **few)


def test_a_decoder_of_speech_says_what_it_says_in_transformers(tmp_path):
    import torch
    import transformers

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 20, "vocab_size": 306}
    sizes |= {"max_source_positions": 50, "max_target_positions": 40}
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    config = transformers.WhisperConfig(**sizes, **{name: TOLD[name] for name in names})
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**TOLD)
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    folder = tmp_path / "in"
    saved(model, folder, extractor)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | write_tokenizer(TOKENIZER, folder)))
    contents = [file(sound(seconds, seed)) for seed, seconds in enumerate((1.0, 0.4, 0.7))]
    found = set()
    with serving(served(folder, tmp_path / "run")) as port:
        for content, language, task in zip(contents, ("en", "de", "en"), ("transcribe",) * 3, strict=True):
            audio = read_sound(content, RATE, 9)
            seen = extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features
            with torch.no_grad():
                made = model.generate(seen, language=language, task=task, max_new_tokens=30, do_sample=False)
            want = [token for token in made[0].tolist() if token < 256]
            got = client(port).audio.transcriptions.create(
                file=("a.wav", io.BytesIO(content)), model="small", language=language, response_format="verbose_json"
            )
            [segment] = got.segments
            assert segment.tokens[:30] == want and got.text == TOKENIZER.decode(np.array(segment.tokens)).strip()
            found.add(tuple(want))
    assert len(found) == 3 and max(len(set(want)) for want in found) > 2


def test_characters_are_those_of_transformers(tmp_path):
    import torch
    import transformers

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"conv_dim": (16, 16, 24), "conv_kernel": (10, 3, 2), "conv_stride": (5, 4, 4), "vocab_size": len(letters)}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer"}
    sizes |= {"do_stable_layer_norm": True, "conv_bias": True, "pad_token_id": 0}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    saved(model, tmp_path / "in", tokenizer, extractor)
    found = set()
    with serving(served(tmp_path / "in", tmp_path / "run")) as port:
        for seed, seconds in enumerate((0.4, 0.1, 0.25)):
            content = file(sound(seconds, seed))
            heard = extractor(read_sound(content, RATE, 9), sampling_rate=RATE, return_tensors="pt").input_values
            with torch.no_grad():
                [want] = tokenizer.batch_decode(model(heard).logits.argmax(-1), skip_special_tokens=True)
            got = client(port).audio.transcriptions.create(file=("a.wav", io.BytesIO(content)), model="small").text
            assert got == want.strip() and len(got) > 3
            found.add(got)
    assert len(found) == 3
