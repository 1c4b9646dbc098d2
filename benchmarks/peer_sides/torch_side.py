"""PyTorch by hand: eager modules, Adam, DistributedDataParallel with gloo when there are several processes."""

import itertools
import os
import pathlib
import sys

import numpy as np
import torch
import torch.multiprocessing
from torch import distributed, nn
from torch.nn import functional
from turns import STEPS, Times, Turns
from works import FOLDER, LEARNING_RATE, WORK, WORKS

NAME = os.environ[WORK]
SIZES = WORKS[NAME]
HERE = pathlib.Path(os.environ[FOLDER])


def load(file: str) -> dict[str, torch.Tensor]:
    """Return the arrays of a file as tensors."""
    with np.load(HERE / file) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


WEIGHTS = load("weights.npz")


def dense(path: str) -> nn.Linear:
    """Return the layer with its first weights."""
    kernel, bias = WEIGHTS[f"{path}/kernel"], WEIGHTS[f"{path}/bias"]
    layer = nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = kernel.T.contiguous().clone(), bias.clone()
    return layer


def conv(path: str) -> nn.Conv2d:
    """Return the layer with its first weights."""
    kernel, bias = WEIGHTS[f"{path}/kernel"], WEIGHTS[f"{path}/bias"]
    layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, padding=1)
    layer.weight.data, layer.bias.data = kernel.permute(3, 2, 0, 1).contiguous(), bias.clone()
    return layer


class MLP(nn.Module):
    """The MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), dense("Dense_0"), nn.ReLU(), dense("Dense_1"), nn.ReLU(), dense("Dense_2")
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.layers(image)


class CNN(nn.Module):
    """The CNN; images come with channels last, as on the other sides."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(f"Conv_{index}") for index in range(4))
        self.last = dense("Dense_0")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = image.permute(0, 3, 1, 2)
        for index, layer in enumerate(self.convs):
            x = functional.relu(layer(x))
            x = functional.avg_pool2d(x, 2) if index % 2 else x
        return self.last(x.permute(0, 2, 3, 1).flatten(1))


class Block(nn.Module):
    """A block of the GPT."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(SIZES.width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = dense(f"{path}/attention/qkv"), dense(f"{path}/attention/out")
        self.mlp_in, self.mlp_out = dense(f"{path}/mlp_in"), dense(f"{path}/mlp_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return an array of the shape of `x`."""
        batch, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, SIZES.num_heads, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(*heads.chunk(3, dim=-1), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    """The GPT; the embedding is the last layer's matrix, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(WEIGHTS["token_embedding/embedding"].clone())
        self.positions = nn.Parameter(WEIGHTS["position_embedding"].clone())
        self.blocks = nn.Sequential(*(Block(f"block_{index}") for index in range(SIZES.num_layers)))
        self.norm = nn.LayerNorm(SIZES.width, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = functional.embedding(tokens, self.tokens) + self.positions
        return self.norm(self.blocks(x)) @ self.tokens.T


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of labels or next tokens."""
    if NAME == "gpt":
        logits = model(batch["tokens"])[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten().long())
    return functional.cross_entropy(model(batch["image"]), batch["label"].long())


class Follow:
    """The turns of the processes that only follow process 0, whose gradients they wait for."""

    def step(self, wait: object) -> bool:
        """Continue."""
        return True


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and its optimizer."""
    model = {"mlp": MLP, "cnn": CNN, "gpt": GPT}[NAME]()
    return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, arrays: dict, start: int, count: int) -> torch.Tensor:
    """Train on `count` examples; return the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, {name: array[start : start + count] for name, array in arrays.items()})
    loss.backward()
    optimizer.step()
    return loss


def train(rank: int, num_processes: int) -> None:
    """Train; process 0 takes the turns, and the others follow it through the gradients' all-reduce."""
    if num_processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["PEER_PORT"]}
        distributed.init_process_group("gloo", None, None, num_processes, rank)
    bare, optimizer = make()
    model = nn.parallel.DistributedDataParallel(bare) if num_processes > 1 else bare
    arrays, size = load("arrays.npz"), SIZES.batch_size
    turns = Turns() if rank == 0 else Follow()
    for start in itertools.cycle(range(0, NUM_EXAMPLES, size)):
        loss = step(model, optimizer, arrays, start + rank * size // num_processes, size // num_processes)
        if not turns.step(loss.item):
            first = {name: array[:size] for name, array in arrays.items()}
            turns.tell(float(loss_of(bare, first).detach()))
            os._exit(0)  # the others wait for its gradients


def train_elastic() -> None:
    """Train under torchrun, which starts all processes again when one dies: from a checkpoint of each step."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    distributed.init_process_group("gloo")
    rank, num_processes, saved = distributed.get_rank(), distributed.get_world_size(), HERE / "checkpoint.pt"
    model, optimizer = make()
    number = 0
    if saved.exists():
        found = torch.load(saved)
        number = found["step"]
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
    replicated = nn.parallel.DistributedDataParallel(model)
    arrays, count = load("arrays.npz"), SIZES.batch_size // num_processes
    times = Times(os.environ[STEPS]) if rank == 0 else None
    while True:
        start = number * SIZES.batch_size % NUM_EXAMPLES + rank * count
        step(replicated, optimizer, arrays, start, count)
        number += 1
        if times:
            state = {"step": number, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
            times.write(number)


NUM_EXAMPLES = len(next(iter(load("arrays.npz").values())))


if __name__ == "__main__":
    if STEPS in os.environ:
        train_elastic()
    if (count := int(sys.argv[1])) == 1:
        train(0, 1)
    torch.multiprocessing.start_processes(train, (count,), count, start_method="fork")
