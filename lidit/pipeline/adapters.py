"""LoRA adapters of a loaded pipeline, under diffusers' names: load, scale, unload, merge, save.

An adapter file holds the thin matrices of the network's layers under `model.`, in peft's form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from lidit.errors import InputError, one_line
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.models.lora import ADAPTER, require_peft

NETWORK = "model"  # the pipeline's component, and the prefix of its keys in a file
LORA_FILE = LORA_WEIGHT_NAME_SAFE


class PipelineAdapters(LoraBaseMixin):
    """What a pipeline does with adapters. `set_adapters` and the like are diffusers' own."""

    _lora_loadable_modules = [NETWORK]
    model: Any

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Put an adapter onto the network; it acts at once, with those that are there already.

        Args:
            source: A safetensors file or a folder with one, such as `lora` of an aligned model; a
                hub id; or tensors.
            adapter_name: By which `set_adapters` scales it; default: default_0, default_1, ...
            weight_name: The file's name in a folder or on the hub.
            revision: Commit of a hub id.
            local_files_only: Never ask the hub: it was fetched before.

        Raises:
            InputError: No such file, one that is no adapter of this network, or a name that is
                taken.
        """
        require_peft()
        origin, tensors, metadata = _read(source, weight_name, revision, local_files_only)
        if adapter_name in getattr(self.model, "peft_config", {}):
            raise InputError(
                f"adapter_name: {adapter_name!r} is taken; give another, or "
                "unload_lora_weights() first"
            )
        self._check(origin, tensors)
        try:
            self.model.load_lora_adapter(
                dict(tensors),
                prefix=NETWORK,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
            )
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            if not getattr(self.model, "peft_config", {}):
                self.model.unload_lora()  # layers that were changed already
            raise InputError(
                f"{origin}: the adapter cannot be loaded ({one_line(error, 200)})"
            ) from None
        self.model.eval()

    def save_lora_weights(
        self, save_directory: str | Path, adapter_name: str | None = None
    ) -> Path:
        """Write an adapter as `load_lora_weights` reads it.

        Args:
            save_directory: The folder.
            adapter_name: Which; default: the only one.

        Returns:
            The file.

        Raises:
            InputError: No such adapter, or several and no name.
        """
        names = list(getattr(self.model, "peft_config", {}))
        if adapter_name is None and len(names) == 1:
            (adapter_name,) = names
        if adapter_name is None or adapter_name not in names:
            raise InputError(
                f"adapter_name: {adapter_name!r} is none of the adapters "
                f"{', '.join(names) or '(none)'}"
            )
        return save_adapter(self.model, Path(save_directory), adapter_name)

    def fuse_lora(
        self,
        components: Sequence[str] = (NETWORK,),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Merge the active adapters into the network's weights; `unload_lora_weights` then forgets
        the thin matrices.

        Args:
            components: The network only.
            lora_scale: Of the adapters.
            safe_fusing: Refuse weights that are not finite.
            adapter_names: Which; default: the active ones.
        """
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: Sequence[str] = (NETWORK,)) -> None:
        """Take merged adapters out of the weights again.

        Args:
            components: The network only.
        """
        super().unfuse_lora(list(components))

    def require_no_adapters(self) -> None:
        """Raise InputError where an adapter is loaded: a saved network is one without."""
        if names := list(getattr(self.model, "peft_config", {})):
            raise InputError(
                f"the adapters {', '.join(names)} are loaded: call fuse_lora() and "
                "unload_lora_weights() to save the "
                "merged network, or save_lora_weights(folder) to save an adapter"
            )

    def _check(self, origin: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """diffusers only warns of keys that fit nothing, and of another shape it learns when layers
        are changed.
        """
        layers = {
            f"{NETWORK}.{n.replace('.base_layer', '')}": layer
            for n, layer in self.model.named_modules()
        }
        for key, value in tensors.items():
            name, _, part = key.partition(".lora_")
            weight = getattr(layers.get(name), "weight", None)
            side = 1 if part.startswith("A") else 0
            if (
                not part
                or weight is None
                or value.ndim < 2
                or value.shape[side] != weight.shape[side]
            ):
                raise InputError(
                    f"{origin}: no adapter of this network: {key!r} {list(value.shape)} fits no "
                    "layer of it"
                )
        if not tensors:
            raise InputError(f"{origin}: no adapter: it holds nothing")


def save_adapter(model: Any, folder: Path, name: str = ADAPTER) -> Path:
    """Write a network's adapter of this name; the file."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, adapter_name=name)
    settings = {NETWORK: _plain(model.peft_config[name].to_dict())}
    PipelineAdapters._save_lora_weights(
        str(folder), {NETWORK: layers}, settings, weight_name=LORA_FILE
    )
    return folder / LORA_FILE


def _read(
    source: str | Path | Mapping[str, torch.Tensor],
    name: str | None,
    revision: str | None,
    local_files_only: bool,
) -> tuple[str, Mapping[str, torch.Tensor], dict[str, Any] | None]:
    """Where an adapter is from, its tensors and its settings."""
    if isinstance(source, Mapping):
        return "the adapter", source, None
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(str(source)):
        path = fetch_snapshot(str(source), revision, [name or "*.safetensors"], local_files_only)
    file = path / (name or LORA_FILE) if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: adapters are safetensors; other formats can run code")
    if not file.is_file():
        raise InputError(f"{file}: no such adapter; give the file, or its folder")
    try:
        return str(file), load_file(file), _load_sft_state_dict_metadata(str(file))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{file}: cannot be read ({one_line(error, 200)}); fetch it again"
        ) from None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """An adapter's settings as JSON has them."""
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
    }
