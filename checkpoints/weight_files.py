"""Tensors in safetensors files, read into models of this repository's classes.

Every name, shape and type is compared with the files' headers first. The tensors are read, one by one, when
all of them agree, so nothing is ever half-loaded. A model on the meta device holds no memory until then.
"""

import itertools
import os
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora import DECODER_LINEARS
from plumbing.machine import show_progress
from plumbing.options import PICKLES, BadInput, one_line, read_json, refuse_pickles, write_whole

TOGETHER = "use files that belong together"
# Constants that older writers stored beside the weights; ours are computed.
CONSTANTS = (
    "position_ids", "rotary_emb.inv_freq", "input_resolution", "context_length", "vocab_size",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes of weights, as safetensors names them


class Source(NamedTuple):
    """Where a parameter lies: a tensor of the files, whole, or a third of its rows, or transposed."""

    name: str
    third: int | None = None  # 0, 1, 2: q, k, v of OpenAI's fused in_proj
    transposed: bool = False  # OpenAI stores projections as (in, out)

    def stored(self, shape: tuple) -> tuple:
        """The shape of the file's tensor, where the parameter's is `shape`."""
        if self.third is not None:
            return (3 * shape[0], *shape[1:])
        return shape[::-1] if self.transposed else shape

    def take(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


def has_weights(folder: str) -> bool:
    """Whether a folder holds files of weights, be they of a kind that is read or of one that is refused."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(n.startswith("model") and ".safetensors" in n or n.endswith(PICKLES) for n in names)


class Tensors:
    """The tensors of a safetensors file, or of a folder with one file or shards, by name. Read when asked.
    path "": there are none, and `fill` draws all that it is asked for."""

    def __init__(self, path: str):
        self.file_of, self.handles = {}, {}
        self.path = path  # the file that names all tensors
        if os.path.isdir(path):
            index, self.path = (os.path.join(path, f"model.safetensors{x}") for x in (".index.json", ""))
            if os.path.exists(index) and not os.path.exists(self.path):  # of both transformers takes the file
                self.path = index
        if self.path.endswith(".json"):
            self.open_shards(path, self.path)
        elif path:
            refuse_pickles(path)  # a folder's, in place of model.safetensors
            self.open(self.path)

    def open_shards(self, folder: str, index: str):
        weight_map = read_json(index, "copy the file again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise BadInput(f"{index}: weight_map is no table of file names; copy the file again")
        for file in sorted(set(weight_map.values())):
            self.open(os.path.join(folder, os.path.basename(file)))
        for name, file in weight_map.items():
            if self.file_of.get(name) != os.path.join(folder, os.path.basename(file)):
                raise BadInput(f"{index}: {name} is not in {file}; copy index and shards again, together")

    def open(self, file: str):
        refuse_pickles(file)
        if not os.path.exists(file):
            words = "copy the weights there; those of a pretrained layout can be drawn: --random_weights"
            raise BadInput(f"{file}: no such file; {words}")
        try:
            with open(file, "rb") as content:
                if content.read(40).startswith(b"version https://git-lfs"):
                    raise BadInput(f"{file}: a pointer of Git LFS; git lfs pull fetches it")
            self.handles[file] = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file}: {one_line(error)}; cut short or damaged: copy it again") from error
        self.file_of |= dict.fromkeys(self.handles[file].keys(), file)

    def prefix(self, ending: str, usual: str) -> str:
        """What stands before `ending` in the only name that ends so; `usual` where none or several do."""
        found = [name.removesuffix(ending) for name in self.file_of if name.endswith(ending)]
        return found[0] if len(found) == 1 else usual

    def header(self, name: str):
        return self.handles[self.file_of[name]].get_slice(name)

    def shape(self, name: str) -> tuple:
        return tuple(self.header(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[self.file_of[name]].get_tensor(name)


def fill(model, tensors: Tensors, sources: dict[str, Source], device, dtype, spare=(), base="", seed=0):
    """Reads the parameters named in `sources` into a model, or draws them where there are no tensors.

    base: how a VideoLM's decoder is held (float32 | bfloat16 | nf4); its projector is then held in 16 bits
    beside the last two. All else is held in `dtype`. A layer is quantised as soon as it is there.

    Raises BadInput, before reading any tensor, if one is missing, has the wrong shape, is not stored as
    floating-point numbers, or is not expected: neither named in CONSTANTS nor starting with a prefix in
    `spare`. Raises it too for a weight that is NaN or infinite.
    """
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name in sources}
    if tensors.path:
        check_tensors(shapes, tensors, sources, spare)
    generator = None if tensors.path else torch.Generator(device).manual_seed(seed)
    layers = itertools.groupby(shapes, key=lambda name: name.rpartition(".")[0])
    num_layers = len({name.rpartition(".")[0] for name in shapes})
    for path, names in show_progress(layers, "loading weights", num_layers):
        module = model.get_submodule(path)
        in_16_bits = base in ("bfloat16", "nf4") and path.startswith(("decoder.", "bridge."))
        kept_in = torch.bfloat16 if in_16_bits else dtype
        for name in names:
            if tensors.path:
                value = read_tensor(tensors, sources[name]).to(device, kept_in).contiguous()
            else:
                value = drawn(name, shapes[name], generator, kept_in)
            setattr(module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
            del value  # or it would outlive its layer's quantisation, until the next one is read
        owner, _, last = path.rpartition(".")
        if base == "nf4" and path.startswith("decoder.") and last in DECODER_LINEARS:
            from checkpoints import nf4

            setattr(model.get_submodule(owner), last, nf4.quantise_linear(module))


def read_own(make, path: str, device="cpu") -> nn.Module:
    """make()'s model with the tensors of a file or folder that this repository wrote: float32, frozen."""
    try:
        model = make()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise BadInput(f"{path}: config.json makes no model ({one_line(error)}); {TOGETHER}") from error
    fill(model, Tensors(path), {name: Source(name) for name in model.state_dict()}, device, torch.float32)
    return model.requires_grad_(False).eval()


def write_own(model: nn.Module, path: str, dtype=torch.float32) -> None:
    """Writes a model's tensors under their own names, for `read_own`."""
    tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in model.state_dict().items()}
    write_whole(path, save(tensors))


def read_tensor(tensors: Tensors, source: Source) -> Tensor:
    value = source.take(tensors[source.name])
    if not value.sum(dtype=torch.float32).isfinite():
        file = tensors.file_of[source.name]
        raise BadInput(f"{file}: {source.name} holds NaN or infinity; use a sound copy of these weights")
    return value


def check_tensors(shapes: dict[str, tuple], tensors: Tensors, sources: dict[str, Source], spare: tuple):
    for name in tensors.file_of:
        if ".base_layer." in name:
            words = "was saved with PEFT's adapters around it; merge_and_unload() first"
            raise BadInput(f"{tensors.path}: {name} {words}")
    for name, wanted in shapes.items():
        source = sources[name]
        if source.name not in tensors.file_of:
            raise BadInput(f"{tensors.path}: tensor {source.name} is missing; {TOGETHER}")
        stored, wanted = tensors.shape(source.name), source.stored(wanted)
        if stored != wanted:
            words = f"tensor {source.name} has shape {stored}, config.json's sizes make it {wanted}"
            raise BadInput(f"{tensors.file_of[source.name]}: {words}; {TOGETHER}")
        if (dtype := tensors.header(source.name).get_dtype()) not in FLOATS:
            words = f"tensor {source.name} is stored as {dtype}, not as floating-point numbers"
            raise BadInput(f"{tensors.file_of[source.name]}: {words}; use a checkpoint in float32 or 16 bits")
    used = {source.name for source in sources.values()}
    for name, file in tensors.file_of.items():
        if name not in used and not name.startswith(spare) and not name.endswith(CONSTANTS):
            raise BadInput(f"{file}: tensor {name} is extra, config.json has no place for it; {TOGETHER}")


def drawn(name: str, shape: tuple, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A parameter as published models start: gains 1, biases 0, all else normal with deviation 0.02. It is
    drawn on the generator's device, and another device gives other draws."""
    if len(shape) == 1 and name.endswith((".weight", ".bias")):
        return torch.full(shape, float(name.endswith(".weight")), device=generator.device, dtype=dtype)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).mul_(0.02)
