"""The source model: loading a LLaMA-family checkpoint, checking it, and putting sliced linears into its blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.layers import SlicedLinear
from mobiq_lightning.routed_input import RoutedInput
from mobiq_lightning.strategies.base import Router, SliceScheme
from mobiq_lightning.strategies.transform_base import InputTransform, Transform

SliceFactory = Callable[[int, int], SliceScheme]
RouterFactory = Callable[[int, int], Router]
Share = Literal["input", "linear"]
Learned = Literal["slices", "weights", "transforms", "routers"]


@dataclass
class BlockLayout:
    """Where the decoder blocks of a model are, and which of their linears read the same input.

    Args:
        blocks: Dotted path of the list of decoder blocks.
        shared_inputs: Groups of linears, by the last part of their name, that read one input. All others have their own.
    """

    blocks: str = "model.layers"
    shared_inputs: list[list[str]] = field(
        default_factory=lambda: [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    )

    def find(self, model: nn.Module) -> nn.ModuleList:
        """The list of decoder blocks.

        Raises:
            ModelError: If there is none at `blocks`.
        """
        found: Any = model
        for part in self.blocks.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
            raise ModelError(
                f"{type(model).__name__} has no list of decoder blocks at {self.blocks!r}; LLaMA, Mistral, Qwen2 and "
                f"relatives have. Name the list in model.layout.blocks (lists in this model: {', '.join(lists) or 'none'})"
            )
        return found

    def group_linears(self, block: nn.Module, share: Share) -> list[list[str]]:
        """Names of the block's linears, those that share a router together, in the order of the modules."""
        names = [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, SlicedLinear))]
        if not names:
            raise ModelError(f"the blocks at {self.blocks!r} ({type(block).__name__}) hold no nn.Linear to slice")
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            shared = next((tuple(g) for g in self.shared_inputs if last in g), (last,)) if share == "input" else (last,)
            groups.setdefault((parent, *shared), []).append(name)
        return list(groups.values())


@dataclass
class Source:
    """A loaded source model.

    Args:
        name: As the recipe names it.
        model: The full-precision causal language model, frozen, in eval mode.
        tokenizer: Its tokenizer.
        tokenizer_hash: Identifies the tokenizer in results.
        fingerprint: Identifies the weights, from sizes and the ends of the weight files.
        folder: The local folder with its files.
        config_changes: Keys of config.json that have other values since a transform was folded into the weights; None if
            none was.
    """

    name: str
    model: Any
    tokenizer: Any
    tokenizer_hash: str
    fingerprint: str
    folder: Path
    config_changes: dict[str, Any] | None = None


class CalibratedBlock(nn.Module):
    """What is learned of one decoder block: the schemes of its linears, the routers and transforms of its inputs.

    Args:
        block: The decoder block; its linears are replaced by `SlicedLinear`.
        groups: Names of the linears of each input.
        slices: Makes the scheme of a linear from (out_features, in_features).
        router: Makes the router of an input from (in_features, n_slices).
        transform: Makes the transforms of inputs; by default there are none.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[Sequence[str]],
        slices: SliceFactory,
        router: RouterFactory,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.schemes = nn.ModuleDict()
        self.inputs = nn.ModuleDict()
        # Not registered, like the block itself: for each input, the linears that read it.
        self.readers: list[tuple[RoutedInput, list[SlicedLinear]]] = []
        for names in groups:
            linears: list[Any] = [block.get_submodule(name) for name in names]
            schemes = [slices(linear.out_features, linear.in_features) for linear in linears]
            slice_bits = schemes[0].slice_bits
            n_weights = sum(linear.weight.numel() for linear in linears)
            in_features = linears[0].in_features
            of_input = None if transform is None else transform.for_input(in_features)
            routed = RoutedInput(
                router(in_features, len(slice_bits)), slice_bits, n_weights, max_bits=None, transform=of_input
            )
            self.inputs[_key(names[0])] = routed
            readers: list[SlicedLinear] = []
            self.readers.append((routed, readers))
            for name, linear, scheme in zip(names, linears, schemes, strict=True):
                self.schemes[_key(name)] = scheme
                parent, _, last = name.rpartition(".")
                readers.append(SlicedLinear(linear, scheme, routed))
                setattr(block.get_submodule(parent), last, readers[-1])

    def routed_inputs(self) -> list[RoutedInput]:
        """The inputs of this block, in the order of its modules."""
        return [module for module in self.inputs.values() if isinstance(module, RoutedInput)]

    @torch.no_grad()
    def show_weights_to_routers(self) -> None:
        """Lets routers that look at weights see them as the slices give them now; see `Router.observe_weights`."""
        for routed, readers in self.readers:
            if type(routed.router).observe_weights is not Router.observe_weights:
                weights = [linear.weight.float() for linear in readers]
                prefixes = [linear.prefixes_on_input() for linear in readers]
                routed.router.observe_weights(
                    torch.cat(weights), torch.cat(prefixes, dim=1), readers[0].scheme.slice_bits
                )

    def routers(self) -> list[Router]:
        """Their routers."""
        return [routed.router for routed in self.routed_inputs()]

    def transforms(self) -> list[InputTransform]:
        """Transforms of those that have one."""
        return [routed.transform for routed in self.routed_inputs() if routed.transform is not None]

    def sliced_linears(self) -> list[SlicedLinear]:
        """The linears of this block, in the order of their inputs."""
        return [linear for _, readers in self.readers for linear in readers]

    def parameters_of(self, kind: Learned) -> list[nn.Parameter]:
        """What is learned: by schemes, of ranges (`slices`) or codes (`weights`), by transforms or routers."""
        codes = [p for linear in self.sliced_linears() for p in linear.scheme.weight_parameters()]
        if kind == "weights":
            return codes
        modules = {"slices": self.schemes.values(), "transforms": self.transforms(), "routers": self.routers()}[kind]
        known = {id(parameter) for parameter in codes}
        return [p for module in modules for p in module.parameters() if id(p) not in known]


def _key(name: str) -> str:
    return name.replace(".", "-")  # keys of a ModuleDict must not contain dots


def load_source(pretrained: str, dtype: str = "auto") -> Source:
    """Loads a causal language model and its tokenizer.

    Args:
        pretrained: Hub id, local folder, or ``builtin``.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: If it cannot be reached, is quantized already, lacks weights, or does not fit its tokenizer.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = _resolve(pretrained, snapshot_download)
    try:
        config = AutoConfig.from_pretrained(folder)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise ModelError(
                f"model.pretrained: {pretrained} is already quantized (quant_method {method}); slicing needs the "
                "16- or 32-bit model it was made from"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, low_cpu_mem_usage=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.pretrained: {folder} cannot be loaded: {_first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"model.pretrained: {folder} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...); they would be random. The download may be incomplete"
        )
    _check_vocabulary(model, tokenizer, pretrained)
    model.eval().requires_grad_(False)
    return Source(pretrained, model, tokenizer, hash_tokenizer(tokenizer), fingerprint(folder), folder)


def _resolve(pretrained: str, snapshot_download: Callable[..., str]) -> Path:
    """Local folder of a model, downloaded if it is a hub id that is not in the cache yet."""
    if pretrained == "builtin":
        from mobiq_lightning.builtin import ensure_builtin_model

        return ensure_builtin_model()
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.pretrained: {path} has no config.json; give a Hugging Face model folder")
        return path
    if path.is_absolute() or pretrained.startswith(".") or pretrained.count("/") > 1:
        raise ModelError(f"model.pretrained: there is no folder {path.absolute()}")
    try:
        return Path(snapshot_download(pretrained, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:
        raise ModelError(
            f"model.pretrained: {pretrained!r} is neither a local folder, nor in the local cache, nor reachable on the "
            f"hub ({type(error).__name__}: {_first_line(error)}). Download it where there is a network and give the "
            "folder: --model.pretrained path/to/folder"
        ) from error


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.pretrained: the tokenizer of {name} ({type(tokenizer).__name__}) has {len(tokenizer)} tokens, the "
            f"model's embedding {rows}; they belong to different models"
        )


def check_finite(model: nn.Module, linears: Sequence[str]) -> None:
    """Raises `ModelError` naming the first of the named linears whose weights hold NaN or infinity."""
    for name in linears:
        weight = model.get_submodule(name).weight
        if isinstance(weight, Tensor) and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 (first 16 hex digits) of a tokenizer's vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((text + repr(tokenizer.special_tokens_map)).encode()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """SHA-256 (first 16 hex digits) of config.json and of name, size, first and last MiB of every weight file."""
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            sha.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            sha.update(file.read())
    return sha.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
