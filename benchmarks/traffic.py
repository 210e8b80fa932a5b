"""Bytes moved and kernels launched by a training step, in nanoGPT's way of computing and in ours. Nothing runs.

    python benchmarks/traffic.py --batch_size=12 --block_size=1024 --save=traffic.json

A GPU that trains a GPT-2 waits for its memory as much as for its arithmetic, and that part can be counted on any
computer. Eager: a step on fake tensors, in which each operation reads its arguments and writes its results once
(views are free). Compiled: torch's own count of the kernels that Inductor makes of model and loss, forward and
backward (GraphLowering.count_bytes, for a CPU under autocast: the graph is a GPU's); what stays outside, the gradients'
norm and AdamW, is counted as in eager. A fused kernel counts for the part of the model that most of its operations are
of. Blocks are alike, so models of two and of three are counted and the others added (--blocks=0 counts all).

nanoGPT's way, and ours with all logits of a micro-step in one chunk, and with a quarter of that. Prints a table, and
one line of JSON last.
"""

import contextlib
import copy
import io
import warnings
from collections import Counter
from unittest import mock

import torch
import torch._functorch.config
from common import finish
from nanogpt import their_attention, their_update
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import configure
from model import GPT, CausalSelfAttention, GPTConfig
from nanofit import machine, settings
from nanofit.batches import RandomBatch
from nanofit.models import loss_of
from nanofit.step import train_step

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
batch_size = 12  # sequences in a micro-step
micro_steps = 1
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dtype = "bfloat16"
blocks = 3  # that are counted, and one less; the others are added. 0: all
compiled = True  # count that too: some minutes
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "micro_steps", "block_size", "n_layer")
settings.one_of(tuple(machine.DTYPES), config, "dtype")
CPU = torch.device("cpu")
VOCAB_SIZE = 50304
PARTS = ("embedding", "norms and residual", "attention", "MLP", "head", "gradients and AdamW")


# ---- the two ways ------------------------------------------------------------------------------------------


class TheirAttention(CausalSelfAttention):
    def forward(self, x, cached=None, seen=0):
        return their_attention(self, x)


class Theirs(GPT):
    """A GPT that computes as nanoGPT does: attention by split and transposes, and the logits of all positions."""

    def __init__(self, shape):
        super().__init__(shape)
        for block in self.transformer.h:
            block.attn.__class__ = TheirAttention

    def forward(self, idx, targets):
        gpt = self.transformer
        x = gpt.drop(gpt.wte(idx) + gpt.wpe(torch.arange(idx.shape[1])))
        for block in gpt.h:
            x = block(x)
        logits = self.lm_head(gpt.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, VOCAB_SIZE), targets.view(-1), ignore_index=-1)


def their_step(model, optimizer, scaler, batches, autocast, grad_clip):
    for _ in range(batches.micro_steps):
        with autocast:
            _, loss = model(*batches.current)
            loss = loss / batches.micro_steps
        batches.advance()
        scaler.scale(loss).backward()
    their_update(model, optimizer, scaler, grad_clip)


logits_mb = -(-4 * batch_size * block_size * VOCAB_SIZE // 2**20)  # of a micro-step, in float32
WAYS = {  # name: (model, step, MiB of logits at a time)
    "nanogpt": (Theirs, their_step, 0),
    "ours": (GPT, train_step, logits_mb),
    "ours_quarter": (GPT, train_step, -(-logits_mb // 4)),
}


# ---- counting ----------------------------------------------------------------------------------------------


def part_of(path):
    """The part of a model that a module belongs to, by its path in it: '.transformer.h.0.attn'."""
    for word, part in (("attn", "attention"), ("mlp", "MLP"), ("ln_", "norms and residual"), ("lm_head", "head")):
        if word in path:
            return part
    if "wte" in path or "wpe" in path:
        return "embedding"
    return "norms and residual" if ".h." in path else "head"  # what is left of a block, and of the model


def tensors_in(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def bytes_of(tensors):
    """What reading or writing these tensors once moves."""
    distinct = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in distinct.values())


aten = torch.ops.aten
LOOKS_UP = {  # operations that touch few elements of an argument: its place among the others
    aten.embedding.default: 0, aten.gather.default: 0, aten.scatter_.src: 0, aten.nll_loss_forward.default: 0,
    aten.nll_loss_backward.default: 1,
}  # fmt: skip
OVERWRITES = (aten.copy_.default, aten.zero_.default, aten.fill_.Scalar)


class Eager(TorchDispatchMode):
    """Counts what the operations of a step read and write: (part, whether model and loss are what computes): bytes.

    A gradient's operation belongs to what it is the gradient of: autograd gives both the same number.
    """

    def __init__(self, model):
        super().__init__()
        self.moved, self.kernels = Counter(), Counter()
        self.modules, self.parts_by_number = [], {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=f".{name}": self.modules.append(path))
            module.register_forward_hook(lambda *_: self.modules.pop() and None)

    def place(self):
        """(part, whether it is of model and loss) of the operation that runs now."""
        node = torch._C._current_autograd_node()
        if self.modules:
            part = part_of(self.modules[-1])
            self.parts_by_number.setdefault(torch._C._autograd._get_sequence_nr() - 1, part)
            return part, True
        part = self.parts_by_number.get(node._sequence_nr()) if node else None
        return part or PARTS[-1], bool(part)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        read, written, changed = tensors_in((args, kwargs)), tensors_in(found), []
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        for argument in func._schema.arguments:
            # AdamW would only write gradients if it had to unscale them.
            if argument.alias_info and argument.alias_info.is_write and argument.name != "grads":
                changed += tensors_in(given.get(argument.name))
        known = {t.untyped_storage()._cdata for t in read}
        new = [t for t in written if t.untyped_storage()._cdata not in known]
        if "empty" in func.name() or not (new or changed):
            return found  # memory that is taken, or a view
        if func in LOOKS_UP:
            table = args[LOOKS_UP[func]]
            read, changed = ([t for t in tensors if t is not table] for tensors in (read, changed))
        if func in OVERWRITES or "out" in given:
            read = [t for t in read if all(t is not c for c in changed)]
        place = self.place()
        self.moved[place] += bytes_of(read) + bytes_of([*new, *changed])
        self.kernels[place] += 1
        return found


class Counted(Exception):
    """Inductor has made its kernels, which need not be written out."""


class Compiled:
    """A backend of torch.compile that counts what Inductor's kernels read and write, by part, and runs none."""

    def __init__(self):
        self.moved, self.kernels = Counter(), Counter()

    def __call__(self, graph, inputs):
        return compile_fx(graph, inputs, inner_compile=self.compile)

    def compile(self, graph, inputs, **options):
        as_given = copy.deepcopy(graph)
        with mock.patch.object(GraphLowering, "compile_to_module", lambda graph: self.count(graph)):
            try:
                compile_fx_inner(graph, inputs, **options)
            except Exception as e:
                if Counted.__name__ not in f"{e!r}":  # torch wraps it in errors of its own
                    raise

        def run(arguments):  # on fake tensors: only sizes
            found = as_given(*arguments)
            arguments.clear()
            return found

        run._boxed_call = True
        return run

    def count(self, graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode):
                continue
            if isinstance(node, ExternKernelSchedulerNode) and isinstance(node.node, ir.MultiOutput):
                continue
            part = self.part_of(node)
            self.moved[part] += node.get_read_write_buffers_sizes()
            self.kernels[part] += 1
        raise Counted

    def part_of(self, node):
        votes = Counter()
        for operation in node.get_nodes():
            for origin in operation.node.get_origins() if operation.node is not None else ():
                stack = origin.meta.get("nn_module_stack") or origin.meta.get("fwd_nn_module_stack")
                if stack:
                    votes[part_of([path for path, _ in stack.values()][-1])] += 1
        return max(votes, key=votes.get) if votes else "head"


# ---- a step ------------------------------------------------------------------------------------------------


def made(way, n_layer):
    """(model, step) of one of the ways; step() is an optimizer step. Within a FakeTensorMode."""
    model_class, step, chunk_mb = WAYS[way]
    with contextlib.redirect_stdout(io.StringIO()):  # every model tells its number of parameters
        model = model_class(GPTConfig(block_size, VOCAB_SIZE, n_layer, n_head, n_embd, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    model.loss_chunk_mb = chunk_mb
    scaler, autocast = machine.grad_scaler(CPU, dtype), machine.autocast(CPU, dtype)
    batches = RandomBatch(batch_size, block_size, VOCAB_SIZE, CPU, micro_steps)
    return model, lambda: step(model, optimizer, scaler, batches, autocast, 1.0)


def eager(way, n_layer):
    """({(part, whether of model and loss): bytes}, the same of kernels) of an optimizer step."""
    with FakeTensorMode():
        model, step = made(way, n_layer)
        step()  # with which AdamW's state comes
        with Eager(model) as counted:
            step()
    return counted.moved, counted.kernels


def compiled_pass(way, n_layer):
    """The same of a forward and a backward pass, compiled."""
    torch.compiler.reset()
    counted = Compiled()
    with FakeTensorMode():
        model, _ = made(way, n_layer)
        batch = RandomBatch(batch_size, block_size, VOCAB_SIZE, CPU).current
        with machine.autocast(CPU, dtype):
            loss = loss_of(torch.compile(model, backend=counted, dynamic=False), *batch)
        loss.backward()
    return tuple(Counter({(part, True): n for part, n in c.items()}) for c in (counted.moved, counted.kernels))


def of_all_blocks(count, way):
    """What count(way, n_layer) gives, found by fewer blocks."""
    if not 0 < blocks < n_layer:
        return count(way, n_layer)
    fewer, more = count(way, blocks - 1), count(way, blocks)
    return tuple(
        Counter({place: b[place] + (n_layer - blocks) * (b[place] - a[place]) for place in a | b})
        for a, b in zip(fewer, more, strict=True)
    )


def figures_of(way):
    """{'eager': {'bytes': {part: n}, 'kernels': {part: n}}, 'compiled': the same}."""
    in_eager = of_all_blocks(eager, way)
    told = {"eager": in_eager}
    if compiled:
        # Outside of model and loss, a compiled step is an eager one.
        outside = (Counter({place: n for place, n in counter.items() if not place[1]}) for counter in in_eager)
        passes = of_all_blocks(compiled_pass, way)
        told["compiled"] = tuple(
            rest + Counter({place: micro_steps * n for place, n in one.items()})
            for rest, one in zip(outside, passes, strict=True)
        )
    return {
        mode: {
            what: {part: counter[part, True] + counter[part, False] for part in PARTS}
            for what, counter in zip(("bytes", "kernels"), counters, strict=True)
        }
        for mode, counters in told.items()
    }


with (
    warnings.catch_warnings(),
    inductor_config.patch(fx_graph_cache=False),
    torch._functorch.config.patch(enable_autograd_cache=False),
):
    warnings.simplefilter("ignore")
    found = {way: figures_of(way) for way in WAYS}

figures = {
    "logits_mb": {way: chunk_mb or logits_mb for way, (*_, chunk_mb) in WAYS.items()},
    "ways": found,
    "ratios": {},
}
for mode in ("eager", "compiled")[: 1 + compiled]:
    print(f"{mode + ': GB, kernels':28}" + "".join(f"{way:>20}" for way in WAYS))
    for part in PARTS:
        cells = (found[way][mode] for way in WAYS)
        print(f"{part:28}" + "".join(f"{c['bytes'][part] / 1e9:12.2f}{c['kernels'][part]:8}" for c in cells))
    sums = {way: {what: sum(found[way][mode][what].values()) for what in ("bytes", "kernels")} for way in WAYS}
    print(f"{'all':28}" + "".join(f"{c['bytes'] / 1e9:12.2f}{c['kernels']:8}" for c in sums.values()))
    ratios = {way: {what: sums[way][what] / sums["nanogpt"][what] for what in sums[way]} for way in WAYS}
    print(f"{'ratio':28}" + "".join(f"{c['bytes']:12.3f}{c['kernels']:8.2f}" for c in ratios.values()))
    figures["ratios"][mode] = ratios
finish("traffic", config, CPU, figures, save)
