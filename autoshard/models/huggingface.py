"""Read the ``config.json`` of a Hugging Face checkpoint as a ``DecoderConfig``.

Only what ``DecoderConfig`` can say is accepted. A field that would change the program
and has no counterpart is an error; a field whose effect is left out on purpose
(dropout) or whose meaning is not known is named in the notes that come back beside the
config. An absent field takes the value that the format documents for its absence; the
sizes have no such value here and must be present.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autoshard.models.config import DecoderConfig, RopeScaling

# Fields that say nothing about the program that trains: checkpoints, tokenizers,
# generation, and the type the weights were stored in.
_HOUSEKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "initializer_range",
        "label2id",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "pretraining_tp",
        "reorder_and_upcast_attn",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_LANGUAGE_MODELS = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


class HfImport(NamedTuple):
    """A config read from Hugging Face, and what reading it left out.

    Attributes:
        config: the shape of the model.
        notes: one sentence per field that is present but not modelled.

    >>> HfImport._fields
    ('config', 'notes')
    """

    config: DecoderConfig
    notes: tuple[str, ...]


def from_hf_config(source: Mapping[str, Any] | str | Path) -> HfImport:
    """Read a Hugging Face config of ``model_type`` ``llama`` or ``gpt2``.

    Args:
        source: the parsed config, the path of a ``config.json``, or a folder with one.

    Returns:
        The config, scanned over layers and computed in bfloat16 from float32
        parameters (the type a checkpoint was stored in does not bind training), and
        the notes.

    Raises:
        ValueError: the file cannot be read, the model type is not known, a size is
            missing, or a field asks for something that is not modelled.

    >>> config, notes = from_hf_config({
    ...     "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    ...     "intermediate_size": 11008, "num_hidden_layers": 32,
    ...     "num_attention_heads": 32, "max_position_embeddings": 4096,
    ...     "attention_dropout": 0.1})
    >>> config.kv_heads, config.rope_theta, len(notes)
    (32, 10000.0, 1)
    """
    fields, where = _load(source)
    reader = _Reader(fields, where)
    model_type = reader.required("model_type")
    readers = {"gpt2": _gpt2, "llama": _llama}
    if model_type not in readers:
        raise ValueError(
            f"{where}: model_type={model_type!r} is not known; readers exist for "
            + ", ".join(sorted(readers))
            + ". Write a DecoderConfig by hand if the architecture is one of these"
        )
    reader.must_be("quantization_config", (None,), "quantised weights")
    reader.must_be("is_encoder_decoder", (False, None), "an encoder")
    reader.must_be("add_cross_attention", (False, None), "cross-attention")
    architectures = reader.get("architectures") or ()
    expected = _LANGUAGE_MODELS[model_type]
    if any(name != expected for name in architectures):
        reader.notes.append(
            f"architectures={list(architectures)!r}: read as {expected}, the language "
            "model of this family"
        )
    config = readers[model_type](reader)
    return HfImport(config, tuple(reader.notes + reader.unread()))


def _llama(reader: "_Reader") -> DecoderConfig:
    embed = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    reader.must_be("hidden_act", ("silu", "swish"), "an activation other than SwiGLU")
    reader.must_be("attention_bias", (False, None), "biases in attention only")
    reader.must_be("mlp_bias", (False, None), "biases in the feed-forward part only")
    reader.no_dropout("attention_dropout")
    theta, scaling = _rope(reader)
    return DecoderConfig(
        name=reader.name("llama"),
        vocab=reader.size("vocab_size"),
        layers=reader.size("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=_or(reader.get("num_key_value_heads"), heads),
        head_dim=_head_dim(reader, embed, heads, reader.get("head_dim")),
        mlp=reader.size("intermediate_size"),
        max_seq=reader.size("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=_or(reader.get("tie_word_embeddings"), False),
        norm_eps=_or(reader.get("rms_norm_eps"), 1e-6),
    )


def _gpt2(reader: "_Reader") -> DecoderConfig:
    embed, heads = reader.size("n_embd"), reader.size("n_head")
    reader.must_be("activation_function", _TANH_GELU, "an activation other than GELU")
    reader.must_be("scale_attn_weights", (True,), "attention scores without scaling")
    reader.must_be(
        "scale_attn_by_inverse_layer_idx", (False,), "attention scaled by layer"
    )
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        reader.no_dropout(field)
    return DecoderConfig(
        name=reader.name("gpt2"),
        vocab=reader.size("vocab_size"),
        layers=reader.size("n_layer"),
        embed=embed,
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(reader, embed, heads, None),
        mlp=_or(reader.get("n_inner"), 4 * embed),
        max_seq=reader.size("n_positions"),
        norm="layer",
        positions="learned",
        activation="gelu",
        use_bias=True,
        tied_head=_or(reader.get("tie_word_embeddings"), True),
        norm_eps=_or(reader.get("layer_norm_epsilon"), 1e-5),
    )


def _rope(reader: "_Reader") -> tuple[float, RopeScaling | None]:
    """Base and stretching: apart in older files, together in ``rope_parameters``."""
    old, new = reader.get("rope_scaling"), reader.get("rope_parameters")
    theta = reader.get("rope_theta")
    rope = dict(old or {}) | dict(new or {})
    theta = float(_or(rope.pop("rope_theta", None), _or(theta, 10_000.0)))
    # "type" is the older spelling of "rope_type"; files may carry both.
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    if kind == "default" and not rope:
        return theta, None
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq",
    }
    if kind != "llama3" or set(rope) != set(names):
        raise ValueError(
            f"{reader.where}: rope scaling {kind!r} with fields {sorted(rope)} is not "
            f"modelled; only null and 'llama3' with {sorted(names)} are. Set it to "
            "null to plan the model at its original context"
        )
    return theta, RopeScaling(**{names[field]: rope[field] for field in rope})


def _head_dim(reader: "_Reader", embed: int, heads: int, given: int | None) -> int:
    if given is not None:
        return given
    if embed % heads:
        raise ValueError(
            f"{reader.where}: a width of {embed} does not split over {heads} heads, "
            "and the config gives no head_dim; correct one of the two sizes"
        )
    return embed // heads


def _or(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where the file holds null or nothing."""
    return default if value is None else value


class _Reader:
    """Reads fields one by one and remembers which were looked at."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where
        self.notes: list[str] = []
        self.seen = set(_HOUSEKEEPING)

    def get(self, field: str) -> Any:
        self.seen.add(field)
        return self.fields.get(field)

    def required(self, field: str) -> Any:
        value = self.get(field)
        if value is None:
            raise ValueError(
                f"{self.where}: field {field!r} is missing; add it (the config.json "
                "beside the weights has it)"
            )
        return value

    def size(self, field: str) -> int:
        value = self.required(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where}: {field}={value!r} must be a positive int")
        return value

    def name(self, default: str) -> str:
        return self.get("_name_or_path") or default

    def must_be(self, field: str, allowed: tuple, meaning: str) -> None:
        """Absence means the format's default, which is always allowed."""
        self.seen.add(field)
        if field in self.fields and self.fields[field] not in allowed:
            raise ValueError(
                f"{self.where}: {field}={self.fields[field]!r} asks for {meaning}, "
                "which the model here does not have; allowed: "
                + ", ".join(repr(value) for value in allowed)
            )

    def no_dropout(self, field: str) -> None:
        rate = self.get(field)
        if rate:
            self.notes.append(f"{field}={rate}: dropout is left out of the program")

    def unread(self) -> list[str]:
        return [
            f"{field}={self.fields[field]!r}: this field is not known and was not read"
            for field in sorted(set(self.fields) - self.seen)
        ]


def _load(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "Hugging Face config"
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); pass a config.json, the "
            "folder that holds one, or the parsed dict"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: holds a JSON {type(fields).__name__}; a config is an object"
        )
    return fields, str(path)
