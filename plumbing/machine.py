"""The machine: device, dtype, processes, an optimizer step over all of them, and fewer, larger products."""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton
from tqdm import tqdm

from plumbing.options import BadInput, CountOrNone, Options

JOINED_BYTES = 2**32  # of the copies that `joined` makes of a decoder's weights
BFLOAT16_UNITS = {"AMX": torch.cpu._is_amx_tile_supported, "AVX512-BF16": torch.cpu._is_avx512_bf16_supported}
ONE_DNN_WIDE, ROW_BLOCK = 256, 64  # D from which oneDNN pays; multiple of rows that it compiles products for
WIDE = 512  # D from which bfloat16 products pay on a CPU; below, casting costs as much as it saves


@dataclass
class MachineOptions(Options):
    """The machine: device, dtype, and what saves memory or time and changes nothing else"""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products (autocast)
    compile: bool = False  # torch.compile: loss (on a GPU always), 4-bit base; a GPU samples by graph
    checkpointing: bool = False  # keep only a layer's input for the backward pass: less memory, slower
    sample_prompts: CountOrNone = 0  # prompts sampled at once; 0: all of a step; fewer need less KV cache
    micro_batch_prompts: CountOrNone = 0  # prompts of one forward and backward; 0: all; fewer: less memory
    memory_plan: bool = False  # print the memory plan, and rehearse the largest possible step first


def pick_device(wanted: str = "auto") -> str:
    """cuda where there is one, unless `wanted` (auto | cpu | cuda) says cpu. BadInput: no GPU to be had."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no GPU; take --device cpu or a torch built for it")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def start_processes(wanted_device: str) -> torch.device:
    """The device of this process. Under torchrun it also joins the group (NCCL on GPUs, gloo on CPUs)."""
    cuda, given = pick_device(wanted_device) == "cuda", os.environ
    several = given.get("WORLD_SIZE", "1") not in ("", "1")
    if several:
        numbers = [given.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")]
        if not all(x.isdecimal() for x in numbers) or not given.get("MASTER_ADDR"):
            raise BadInput(f"WORLD_SIZE={numbers[0]}: not set by torchrun; unset it, or start with torchrun")
        if int(numbers[1]) >= int(numbers[0]) or int(numbers[3]) >= 2**16:
            words = f"RANK={numbers[1]}, WORLD_SIZE={numbers[0]}, MASTER_PORT={numbers[3]}"
            raise BadInput(f"{words}: no such process or port; start with torchrun")
        dist.init_process_group("nccl" if cuda else "gloo")
    index = int(given["LOCAL_RANK"]) if several else 0
    if cuda:
        torch.cuda.set_device(index)
    return torch.device("cuda", index) if cuda else torch.device("cpu")


def pick_dtype(wanted: str, device: torch.device, width: int) -> str:
    """The dtype of the matrix products, "float32" or "bfloat16". width: D of the decoder.

    `auto` asks what the processor is and measures nothing, so that every start decides alike. Of several
    processes the first one decides.
    """
    chosen, why = wanted, ""
    if wanted == "auto" and device.type == "cuda":
        chosen, why = "bfloat16", "on a GPU"
    elif wanted == "auto":
        fast = [name for name, has in BFLOAT16_UNITS.items() if has()]
        chosen = "bfloat16" if fast and width >= WIDE else "float32"
        why = f"CPU with {fast[0]}, D = {width}" if fast else "a CPU without bfloat16 instructions"
    if dist.is_initialized():
        box = [chosen]
        dist.broadcast_object_list(box, src=0)
        chosen = box[0]
    if why and process_info()[0] == 0:
        print(f"computing in {chosen} ({why}; --dtype to change)", flush=True)
    return chosen


def pick_products(decoder: nn.Module, device: torch.device) -> None:
    """oneDNN instead of MKL for a decoder's float32 products, where MKL keeps to AVX2: it is twice as fast on
    AMD's CPUs with AVX-512. "bf16" allows it to round to bfloat16; it does so only on AMX, excluded here.

    oneDNN compiles a product for each number of rows that is new, in 4 to 8 ms: rows come in blocks, and a
    narrow decoder takes it only for a step's sampling (`steady_products`), whose shapes hardly change."""
    has = {name for name, has in BFLOAT16_UNITS.items() if has()} if device.type == "cpu" else set()
    decoder.one_dnn = has == {"AVX512-BF16"}
    wide = decoder.one_dnn and decoder.cfg.dim >= ONE_DNN_WIDE
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if wide else "none"
    in_16_bits = device.type == "cpu" and decoder.compute_dtype != torch.float32
    decoder.row_block = ROW_BLOCK if wide or in_16_bits else 1


@contextmanager
def steady_products(decoder: nn.Module):
    """Within it a decoder of any width takes oneDNN's products, if `pick_products` found that they pay."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision, decoder.row_block
    if decoder.one_dnn:
        settings.fp32_precision, decoder.row_block = "bf16", ROW_BLOCK
    try:
        yield
    finally:
        settings.fp32_precision, decoder.row_block = before


def set_up(decoder: nn.Module, options: MachineOptions) -> None:
    """A model.Decoder computes as the options say. Sets options.dtype to what `auto` became."""
    device = decoder.head.device
    options.dtype = pick_dtype(options.dtype, device, decoder.cfg.dim)
    decoder.compute_dtype = getattr(torch, options.dtype)
    decoder.checkpointing, decoder.captured = options.checkpointing, options.compile
    pick_products(decoder, device)
    if decoder.compute_dtype != torch.float32:
        hold(decoder, decoder.compute_dtype)
    for layer in decoder.modules():
        if options.compile and hasattr(layer, "dequantise"):
            layer.dequantise = compiled(layer.dequantise, device.type)


def process_info() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_process(do, *given) -> None:
    """do(*given) in the first process, while the others wait for it."""
    if process_info()[0] == 0:
        do(*given)
    if dist.is_initialized():
        dist.barrier()


def say(line: str) -> None:
    """Prints a line, once for all processes; in a terminal it breaks between words."""
    if process_info()[0] == 0:
        print(fitted(line), flush=True)


def fitted(line: str) -> str:
    """The line or lines, broken between words where standard output is a terminal that is narrower."""
    if not sys.stdout.isatty():
        return line
    columns = shutil.get_terminal_size().columns
    return "\n".join(textwrap.fill(part, columns, break_on_hyphens=False) for part in line.splitlines())


def show_progress(parts, name: str, total: int | None = None):
    """The parts, with a bar in a terminal where they take longer than a second."""
    shown = process_info()[0] == 0 and sys.stdout.isatty()
    where = dict(disable=not shown, file=sys.stdout, dynamic_ncols=True)
    return tqdm(parts, name, total, leave=False, delay=1, **where)


def reduce_sum(*values: torch.Tensor | float, device) -> list[float]:
    """Sums over all processes; with one process the values themselves."""
    packed = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(packed)
    return packed.tolist()


def optimizer_step(optimizer, lr: float, max_norm: float) -> float:
    """One step at rate lr with the gradients of all processes, summed and clipped to max_norm; they are
    cleared. A parameter without gradient counts as one of zero. Returns the norm before clipping; if it is
    not finite, nothing but the gradients has changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        grads = [p.grad for p in parameters]
        flat = torch.nn.utils.parameters_to_vector(grads)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, grads)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if torch.isfinite(norm):
        optimizer.step()
    for p in parameters:
        p.grad = None
    return norm.item()


def works(compiler: str, language: str) -> bool:
    """Whether this compiler is there and takes a program. language: c | c++."""
    words = shlex.split(compiler)
    if not words or not shutil.which(words[0]):
        return False
    program = dict(input=b"int main() { return 0; }", capture_output=True)
    return subprocess.run([*words, "-fsyntax-only", "-x", language, "-"], **program).returncode == 0


@functools.cache
def compiled(fn, device_type: str):
    """torch.compile(fn), made once; where its tools are missing fn itself, with a line on stderr."""
    language, name, usual = ("c", "CC", "gcc") if device_type == "cuda" else ("c++", "CXX", "g++")
    compiler = os.environ.get(name, usual)
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # of Debian's python3-dev
    tools = {
        "Triton for this GPU": device_type != "cuda" or has_triton(),
        f"compiler {compiler!r} that works": works(compiler, language),
        header: os.path.isfile(header),
    }
    missing = [name for name, found in tools.items() if not found]
    if not missing:
        return torch.compile(fn)
    print(f"compile: no {', no '.join(missing)}; {fn.__name__} runs uncompiled", file=sys.stderr)
    return fn


class Captured:
    """function(tokens, t) as a CUDA graph, for a sampling step whose shapes are the same at every t: captured
    once, then a token costs one launch. tokens (P, G) int64 on the GPU."""

    def __init__(self, function, tokens: Tensor):
        self.tokens = tokens.clone()
        self.t = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside: what only a first call makes is not captured
            function(self.tokens, self.t)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.state = function(self.tokens, self.t)

    def __call__(self, tokens: Tensor, t: int) -> Tensor:
        """The state, which the next call overwrites."""
        self.tokens.copy_(tokens)
        self.t.fill_(t)
        self.graph.replay()
        return self.state


def same_input(decoder: nn.Module):
    """(owner, linear layers that read one input, the one after them) of each half of a model.Decoder's
    layers."""
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield attention, [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        yield mlp, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]


def base_of(linear: nn.Module) -> nn.Module:
    return getattr(linear, "base", linear)


def hold(decoder: nn.Module, dtype: torch.dtype) -> None:
    """Casts a decoder's frozen linear layers to the dtype of its products once, and not in each product.
    Those that read one input lie side by side in memory, so that `joined` copies nothing."""
    for _, *groups in same_input(decoder):
        for bases in ([base_of(x) for x in group] for group in groups):
            if all(isinstance(base, nn.Linear) for base in bases):
                weight = torch.cat([base.weight.detach().to(dtype) for base in bases])
                parts = weight.split([base.out_features for base in bases])
                for base, part in zip(bases, parts, strict=True):
                    base.weight.data, base.side_by_side = part, weight


class Joined:
    """Frozen linear layers (lora.LoRALinear, or plain) that read the same input, as one product.

    float32: each W + (alpha / r) B A, stacked. Other dtypes: the products of the training pass with the same
    roundings, W x and A x. A weight rounded after B A is added would sample from another policy.
    """

    def __init__(self, linears: list[nn.Module], dtype: torch.dtype):
        bases = [base_of(layer) for layer in linears]
        self.sizes, self.dtype, self.down = [base.out_features for base in bases], dtype, None
        self.bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases]).to(dtype)
        pairs = [layer.pair() if hasattr(layer, "pair") else (None, None) for layer in linears]
        weights, adapted = [base.weight.detach() for base in bases], pairs[0][0] is not None
        if adapted and dtype == torch.float32:
            parts = zip(weights, linears, pairs, strict=True)
            weights = [torch.addmm(W.float(), B * x.scale, A) for W, x, (A, B) in parts]
        elif adapted:
            self.down = torch.cat([A for A, _ in pairs]).to(dtype)
            ups = [B * x.scale for x, (_, B) in zip(linears, pairs, strict=True)]
            self.up = torch.block_diag(*ups).T.to(dtype).contiguous()
        held = getattr(bases[0], "side_by_side", None) if dtype != torch.float32 else None
        self.weight = torch.cat([x.to(dtype) for x in weights]) if held is None else held

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., sum of out), in dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        y = F.linear(rows, self.weight)
        if self.down is not None:
            y.addmm_(rows @ self.down.T, self.up)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the layers one by one."""
        return self(x).split(self.sizes, dim=-1)


def joinable(linears: list[nn.Module], dtype: torch.dtype) -> bool:
    """Whether `joined` takes a decoder's linear layers: plain ones that lie side by side in this dtype
    already (`hold`), or whose copies take JOINED_BYTES at most."""
    if not all(isinstance(x, nn.Linear) for x in linears):
        return False
    held = all(hasattr(x, "side_by_side") and x.weight.dtype == dtype for x in linears)
    return held or sum(x.weight.numel() for x in linears) * dtype.itemsize <= JOINED_BYTES


@contextmanager
def joined(decoder: nn.Module):
    """Within it, without gradient, each layer of a model.Decoder takes 4 large products where it has 7 linear
    layers of three products each. A base of 4 bits, or one whose copies would take more than JOINED_BYTES, is
    left as it is."""
    groups, dtype = list(same_input(decoder)), decoder.compute_dtype
    linears = [base_of(x) for _, first, last in groups for x in first + last]
    if not joinable(linears, dtype):
        groups = []
    with torch.no_grad():
        try:
            for owner, first, last in groups:
                owner.joined = Joined(first, dtype), Joined(last, dtype)
            yield
        finally:
            for owner, _, _ in groups:
                owner.joined = None


def processor() -> str:
    """The CPU's name where the system tells it, and the GPU's where there is one."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def environment() -> dict:
    """What numbers depend on beside the options: versions, commit, processor, threads, processes."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*words):
        if not shutil.which("git"):
            return ""
        found = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    return {
        "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
        "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "processes": process_info()[1], "processor": processor(),
        "packages": {name: version(name) for name in ("numpy", "pillow", "av", "safetensors", "tqdm")},
    }  # fmt: skip


def describe(device: torch.device) -> str:
    """The device in words, for results.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {process_info()[1]} process(es)"
