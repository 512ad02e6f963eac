"""The shapes of a model, without its weights: what memory, disk and time are computed from.

The model's class is made on torch's meta device, where a tensor has a shape and no content; so every architecture that
transformers knows has exact counts. torch is imported by the functions only.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import hub
from preference_tuning.config import BaseModelConfig, LoraConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import gguf
from preference_tuning.models.source import ModelSource

DENSE = 0.9
"""Share of the parameters in linear layers and embeddings from which on the rest is only norms and biases."""


class Linear(BaseModel):
    """Linear layers of one name and shape."""

    name: str
    """The last part of it, such as q_proj."""
    inputs: int
    outputs: int
    count: int

    @property
    def parameters(self) -> int:
        """Weights of all of them, biases left out."""
        return self.inputs * self.outputs * self.count


class Shapes(BaseModel):
    """The sizes that a language model is made of."""

    architecture: str
    parameters: int
    """All of them; tied ones count once."""
    tensors: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    positions: int | None
    """Longest sequence that it was made for, where it says so."""
    tied: bool
    """Whether the head is the embedding."""
    linears: list[Linear]
    """Those of the layers; the head is not among them."""
    quantised: bool
    """Whether the weights on disk are; such do not train."""
    no_tree: str | None
    """Why the model cannot read token trees; None if it can."""

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def linear(self) -> int:
        """Parameters in the linear layers."""
        return sum(layer.parameters for layer in self.linears)

    @property
    def dense(self) -> bool:
        """Whether the linear layers and the embeddings are nearly all of it; experts of a mixture are not."""
        return self.linear + self.embedding * (1 if self.tied else 2) >= DENSE * self.parameters

    def trained(self, lora: LoraConfig | None) -> int:
        """Return how many parameters train: those of the adapter, or all."""
        if lora is None:
            return self.parameters
        adapted = (layer for layer in self.linears if layer.name in lora.target_modules)
        return sum(lora.rank * (layer.inputs + layer.outputs) * layer.count for layer in adapted)

    def check_adaptable(self, lora: LoraConfig | None) -> None:
        """Refuse an adapter on modules that the model does not have, and the training of quantised weights.

        Raises:
            ConfigError: names them, and those that are there.
        """
        if lora is None and self.quantised:
            raise ConfigError(
                "base_model.source: the model's weights are quantised, and lora is null; such weights do not train. "
                "Give a lora section, or the model before it was quantised"
            )
        there = sorted({layer.name for layer in self.linears})
        missing = [name for name in lora.target_modules if name not in there] if lora else []
        if missing:
            raise ConfigError(
                f"lora.target_modules: the model has no {', '.join(missing)}; its linear modules: {', '.join(there)}"
            )


def read(config: BaseModelConfig, source: ModelSource, output_dir: Path, attention: str) -> Shapes:
    """Return the shapes of a model from its configuration.

    Args:
        config: the section of the run config.
        source: where the model lies.
        output_dir: where conversions are kept.
        attention: the implementation that will run, as in ``Compute``.

    Raises:
        ConfigError: there is no readable configuration, or it is not that of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where, how = _folder(source, output_dir)
    try:
        with gguf.read_once():
            settings = AutoConfig.from_pretrained(where, **how)
        quantised = getattr(settings, "quantization_config", None) is not None and source.kind != "gguf"
        known = attention if attention in ("sdpa", "eager") else "sdpa"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, attn_implementation=known)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"base_model.source: cannot load {config.source}: {reason}") from None
    return _of_model(model, config.max_seq_length, quantised)


def _folder(source: ModelSource, output_dir: Path) -> tuple[Path, dict[str, Any]]:
    if source.kind == "hub":
        return hub.download_tokenizer(source.location, source.fingerprint), {}
    if source.kind == "directory":
        return Path(source.location), {}
    converted = gguf.folder(output_dir, source.fingerprint)
    if (converted / "config.json").is_file():
        return converted, {}
    path = Path(source.location)
    return path.parent, {"gguf_file": path.name}


def _of_model(model: Any, longest: int, quantised: bool) -> Shapes:
    from torch import nn

    from preference_tuning.models import scoring

    settings, head = model.config.get_text_config(), model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    found = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    heads = settings.num_attention_heads
    return Shapes(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tensors=sum(1 for _ in model.parameters()),
        vocabulary=embedding.shape[0],
        hidden=settings.hidden_size,
        layers=settings.num_hidden_layers,
        heads=heads,
        key_heads=getattr(settings, "num_key_value_heads", None) or heads,
        head_width=getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        positions=getattr(settings, "max_position_embeddings", None),
        tied=head.weight is embedding,
        linears=[Linear(name=n, inputs=i, outputs=o, count=count) for (n, i, o), count in sorted(found.items())],
        quantised=quantised,
        no_tree=scoring.refuses_shared_prompt(model, longest),
    )
