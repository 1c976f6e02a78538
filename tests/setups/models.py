"""Networks and their losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.runs import Regressor, loader
from tests.setups.case import BY_DIFFERENCES, Case


class Network(Regressor):
    """Half the squared error, or a loss of its own, of any network."""

    def __init__(
        self, net: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None, optimizer: Any = None
    ) -> None:
        super().__init__(net)
        self.loss_fn = loss_fn
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) if self.loss_fn is None else self.loss_fn(self.net, batch)

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.optimizer is None else self.optimizer(self.parameters())


class Packed(Network):
    """Tells Lightning how many samples its batch has, which a PackedSequence does not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch["targets"]))
        return loss


def generated(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- transformers ----------------------------------------------------------------------------------------------------


def warmed_up(parameters: Any) -> Any:
    """AdamW with a linear warm-up, as language models are finetuned."""
    import transformers

    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def language_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def next_word(model: nn.Module, batch: Any) -> Tensor:
    """GPT-2's loss without its rounding to float32."""
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def gpt2(loss_fn: Callable[[nn.Module, Any], Tensor] = language_loss) -> LightningModule:
    """Tied weights: the embedding is the last layer, too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"vocab_size": 5, "n_positions": 5, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 4}
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
    return Network(transformers.GPT2LMHeadModel(config).train(), loss_fn, warmed_up)


def bert() -> LightningModule:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, intermediate_size=4, max_position_embeddings=5)
    return Network(transformers.BertForMaskedLM(config).train(), language_loss, warmed_up)


def sentences() -> DataLoader[Any]:
    """Padded on the right; what is padded is not predicted."""
    tokens = torch.randint(1, 5, (6, 5), generator=generated())
    there = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 4])[:, None]
    rows = [
        {"input_ids": row * mask, "attention_mask": mask.long(), "labels": row.where(mask, -100)}
        for row, mask in zip(tokens, there, strict=True)
    ]
    return DataLoader(rows, 3)  # type: ignore[arg-type]


# ---- pictures --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return F.relu(pictures + self.body(pictures))


def resnet() -> LightningModule:
    stem = (nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    net = nn.Sequential(*stem, Block(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    return Network(net, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1))


class Pictures(torch.utils.data.Dataset[Any]):
    """Cropped at random and mirrored, as always on small pictures."""

    def __init__(self, crops: bool) -> None:
        self.pictures = torch.randn(12, 1, 6, 6, generator=generated())
        self.classes = torch.randint(3, (12,), generator=generated())
        self.crops = crops

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        picture = self.pictures[index]
        if self.crops:
            top, left = torch.randint(3, (2,)).tolist()
            picture = F.pad(picture, (1, 1, 1, 1))[:, top : top + 6, left : left + 6]
            picture = picture.flip(-1) if torch.rand(()) < 0.5 else picture
        return picture, self.classes[index]


# ---- sequences -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells = kind(2, 3, batch_first=True, bidirectional=kind is nn.GRU)
        self.head = nn.Linear(6 if kind is nn.GRU else 3, 1)

    def forward(self, packed: Any) -> Tensor:
        outputs, lengths = rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)
        states: Tensor = self.head(outputs[torch.arange(len(lengths)), lengths - 1])
        return states


def sequences() -> list[Any]:
    lengths = [5, 2, 3, 4, 1, 5, 3, 2]
    return [(torch.randn(length, 2, generator=generated(length)), torch.tensor([length / 5])) for length in lengths]


def padded(rows: list[Any]) -> Any:
    return (
        rnn.pad_sequence([row[0] for row in rows], batch_first=True),
        torch.tensor([len(row[0]) for row in rows]),
        torch.stack([row[1] for row in rows]),
    )


def packed(rows: list[Any]) -> Any:
    return {
        "words": rnn.pack_sequence([row[0] for row in rows], enforce_sorted=False),
        "targets": torch.stack([row[1] for row in rows]),
    }


def packs_inside(model: nn.Module, batch: Any) -> Tensor:
    words, lengths, targets = batch
    packed = rnn.pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
    return (model(packed) - targets).square().mean()


def packed_outside(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["words"]) - batch["targets"]).square().mean()


# ---- embeddings ------------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    """Words into two numbers."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(3, 2))

    def forward(self, words: Tensor) -> Tensor:
        vectors = self.embedding(words)
        outputs: Tensor = self.head(vectors if vectors.ndim == 2 else vectors.mean(1))
        return outputs


def embedded(make: Callable[..., nn.Module], **options: Any) -> Callable[[], LightningModule]:
    return lambda: Network(Embedded(make(6, 3, **options)), optimizer=lambda each: torch.optim.SGD(each, lr=0.05))


def words() -> DataLoader[Any]:
    rows = torch.randint(6, (12, 4), generator=generated())
    return loader(torch.utils.data.TensorDataset(rows, torch.randn(12, 2, generator=generated())))


# ---- memory and adapters ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Evaluates its first half again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 2)
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_(self.use_reentrant)  # it asks for an input with a gradient
        outputs: Tensor = self.second(checkpoint(self.first, inputs, use_reentrant=self.use_reentrant))
        return outputs


class LowRank(nn.Module):
    """A frozen layer and what is learned beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 1) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs) + inputs @ self.down.T @ self.up.T
        return outputs


def adapted() -> LightningModule:
    return Network(nn.Sequential(LowRank(nn.Linear(4, 5)), nn.Tanh(), LowRank(nn.Linear(5, 2))))


class Siamese(Regressor):
    """Holds its network twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = self.net

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (self.net(inputs) - self.twin(-inputs) - targets).square().mean()


# ---- the rows --------------------------------------------------------------------------------------------------------

NO_MEAN = "its loss is no mean over samples; FullBS: over chunks of training's batch size"
RANDOM = "every chunk of FullBS has random numbers of its own, so the step's batch is compared"
ADAPTIVE = "the stability limits differ between parameters"

MODELS = [
    Case("perceptron, SGD with momentum"),
    Case(
        "GPT-2 of `transformers`: tied weights, padding, -100; AdamW with warm-up, clipping",
        gpt2,
        sentences,
        twin=lambda: gpt2(next_word),
        sizes=lambda batch: len(batch["labels"]),
        options={"gradient_clip_val": 1.0},
        says=("gradient_clip_val=1.0 shortens steps", ADAPTIVE),
        note=NO_MEAN,
    ),
    Case(
        "BERT of `transformers`, masked, with dropout; AdamW with warm-up, clipping",
        bert,
        sentences,
        full=None,
        options={"gradient_clip_val": 1.0},
        says=("gradient_clip_val=1.0 shortens steps", ADAPTIVE),
        note=RANDOM,
    ),
    Case("ResNet, BatchNorm in train mode", resnet, lambda: loader(Pictures(False)), note=NO_MEAN),
    Case(
        "ResNet, random crops and flips", resnet, lambda: loader(Pictures(True), shuffle=True), full=None, note=RANDOM
    ),
    Case(
        "LSTM, sequences packed in `training_step`",
        lambda: Network(Recurrent(nn.LSTM), packs_inside),
        lambda: loader(sequences(), collate_fn=padded),
    ),
    Case(
        "GRU in both directions, sequences packed by `collate_fn`",
        lambda: Packed(Recurrent(nn.GRU), packed_outside),
        lambda: loader(sequences(), collate_fn=packed),
        sizes=lambda batch: len(batch["targets"]),
    ),
    Case("`Embedding(sparse=True)`", embedded(nn.Embedding, sparse=True), words),
    Case(
        "`EmbeddingBag`",
        embedded(nn.EmbeddingBag),
        words,
        measured="differences",
        current=BY_DIFFERENCES,
        full=BY_DIFFERENCES,
        says=("Products by autograd are impossible (net.embedding (EmbeddingBag)",),
    ),
    Case(
        '`EmbeddingBag(sparse=True, mode="sum")`',
        embedded(nn.EmbeddingBag, sparse=True, mode="sum"),
        words,
        measured="differences",
        current=BY_DIFFERENCES,
        full=BY_DIFFERENCES,
        says=("Products by autograd are impossible (net.embedding (EmbeddingBag)",),
    ),
    Case("activation checkpointing, `use_reentrant=False`", lambda: Network(Checkpointed(False))),
    Case(
        "activation checkpointing, `use_reentrant=True`",
        lambda: Network(Checkpointed(True)),
        measured="refused",
        says=("activation checkpointing with use_reentrant=True hides parameters",),
        note="pass `use_reentrant=False`",
    ),
    Case("one network under two names", Siamese),
    Case("frozen base with adapters (LoRA)", adapted, note="the Hessian of what is trained"),
]
