"""Recipes by name: functions of a few arguments, composed with `Recipe.replace`.

`RECIPES` maps each name to a function without arguments. To make one's own, change fields on the
command line, or write a function here.
"""

from collections.abc import Callable
from functools import partial

from hackle.zoo.errors import unknown
from hackle.zoo.train.recipe import REQUIRED, Recipe

STREAMS = (1, 2, 4, 8)


def tiny(streams: int) -> Recipe:
    """1.1M weights in the trunk; learns to write Python-like lines on a CPU within minutes."""
    return Recipe(
        model=f"parscale-tiny-p{streams}",
        length=256,
        batch=8,
        steps=800,
        learning_rate=5e-3,
        warmup=40,
        eval_every=100,
        save_every=100,
    )


def small(streams: int) -> Recipe:
    """25M weights for one GPU, four epochs of the standard library.

    Rows are one segment each, which cuDNN's attention can honour; packed documents it cannot.
    """
    return Recipe(
        model=f"parscale-tiny-p{streams}",
        overrides={
            "width": 512, "mlp_width": 1408, "depth": 8, "heads": 8, "head_width": 64,
            "prefix_length": 48, "embedding_std": 0.02,
        },
        length=512,
        batch=32,
        packing="stream",
        steps=600,
        learning_rate=1e-3,
        warmup=60,
        preset="h100x1",
        eval_every=100,
        eval_batches=12,
        save_every=300,
    )  # fmt: skip


def pararnn_tiny() -> Recipe:
    """1.9M weights; learns to write Python-like lines on a CPU within minutes."""
    return tiny(1).replace(model="pararnn-tiny-gru", state_clip=0.5)


def pararnn_100m() -> Recipe:
    """109M weights for one GPU, four epochs of the standard library.

    Width, heads, weight decay, z-loss, warm-up, schedule and the bound of the state matrices are
    those of the paper's 400M model, of which this is a third of the depth. The learning rate is
    the paper's for the LSTM and the transformer of that size (GRU: 5e-3), so that `dense_100m`
    has the same; the betas are ours, since the paper does not say.
    """
    return Recipe(
        model="pararnn-400m-gru",
        overrides={"depth": 8},
        length=1024,
        batch=32,
        packing="stream",
        steps=300,
        learning_rate=3e-3,
        warmup=30,
        final=0.0,
        weight_decay=1e-3,
        z_loss=1e-4,
        state_clip=0.5,
        preset="h100x1",
        remat="none",
        eval_every=100,
        eval_batches=12,
        save_every=300,
    )


def dense_100m() -> Recipe:
    """The transformer beside `pararnn_100m`: 111M weights, the same width, depth, MLP and data."""
    return pararnn_100m().replace(
        model="dense-tiny",
        overrides={
            "width": 1024, "mlp_width": 2816, "depth": 8, "heads": 16, "kv_heads": 16,
            "head_width": 64, "max_length": 2048, "tie_embeddings": False, "embedding_std": 0.02,
        },
        attention="cudnn",
        state_clip=None,
    )  # fmt: skip


def multiverse_tiny() -> Recipe:
    """0.8M weights, for a CPU: well-formed text within minutes, a quarter of it right."""
    return Recipe(
        model="multiverse-tiny",
        corpus="mapreduce-easy",
        packing="branches",
        vocab_size=192,
        length=512,
        batch=8,
        steps=800,
        learning_rate=3e-3,
        warmup=40,
        weight_decay=0.01,
        eval_every=100,
        eval_batches=4,
        save_every=200,
    )


def multiverse_small() -> Recipe:
    """14M weights for one GPU, on MapReduce problems that do not come twice."""
    return multiverse_tiny().replace(
        overrides={
            "width": 384, "mlp_width": 1024, "depth": 8, "heads": 6, "kv_heads": 6,
            "head_width": 64, "embedding_std": 0.02,
        },
        corpus="mapreduce",
        length=1024,
        batch=32,
        steps=20_000,
        learning_rate=1e-3,
        warmup=150,
        preset="h100x1",
        remat="none",
        workers=8,
        eval_every=500,
        save_every=1000,
    )  # fmt: skip


def sequential(base: Recipe) -> Recipe:
    """The twin of a recipe on problems: the same traces without tags, read one after the other."""
    return base.replace(packing="documents")


def multiverse_finetune() -> Recipe:
    """Multiverse-32B from Qwen2.5-32B-Instruct, with the published settings; eight stages.

    Set `corpus` to the JSONL of the published rows, `tokenizer` to the trunk's and `start_from`
    to the trunk (`scripts/convert.py import`). A published step has 16 conversations, one a row;
    here rows are filled, with three or four. How many steps the stages are is said at the start.
    """
    return Recipe(
        model="multiverse-32b",
        corpus="multiverse-1k.jsonl",
        packing="branches",
        vocab_size=151680,
        length=32768,
        batch=8,
        steps=500,
        learning_rate=1e-5,
        warmup=25,
        final=0.0,
        weight_decay=1e-4,
        start_from=REQUIRED,
        continue_data=False,
        preset="h100x8_fsdp",
        remat="full",
        eval_every=0,
        eval_batches=0,
        save_every=100,
    )


def stage_1(base: Recipe) -> Recipe:
    """The first of two stages: P=1, warm-up and then a constant learning rate.

    `base` is a recipe of P=1.
    """
    return base.replace(schedule="wsd", decay=0)


def stage_2(base: Recipe, share: float = 0.25) -> Recipe:
    """The second: P streams around the trunk of stage 1, on the data that follow.

    The new parameters are N(0, 0.02^2). All of stage 2 but a short warm-up is the decay of the
    learning rate, as in the paper's 1T-token run, where this stage was 2 % of the tokens.

    Args:
      base: the recipe of P streams that would train from scratch.
      share: of the steps of `base`.
    """
    steps = max(round(base.steps * share), 2)
    warmup = max(steps // 20, 1)
    return base.replace(
        schedule="wsd", steps=steps, warmup=warmup, decay=steps - warmup, start_from=REQUIRED
    )


def frozen_trunk(base: Recipe, share: float = 0.25) -> Recipe:
    """Stage 2 with only prefixes and aggregator trained (the paper's tuning of Qwen2.5-3B)."""
    return stage_2(base, share).replace(mode="frozen_trunk")


def throughput(size: str, streams: int, batch: int, accumulate: int = 1) -> Recipe:
    """Speed of a released size on one H100: random tokens, 20 steps, nothing kept."""
    return Recipe(
        model=f"parscale-{size}-p{streams}",
        corpus="random",
        packing="stream",
        vocab_size=151936,
        length=2048,
        batch=batch,
        accumulate=accumulate,
        steps=20,
        warmup=5,
        learning_rate=3e-4,
        preset="h100x1",
        remat="full",
        eval_every=0,
        eval_batches=0,
        save_every=0,
        keep=0,
        export=False,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"parscale-tiny-p{p}": partial(tiny, p) for p in STREAMS},
    **{f"parscale-small-p{p}": partial(small, p) for p in STREAMS},
    "parscale-tiny-stage1": lambda: stage_1(tiny(1)),
    "parscale-tiny-stage2-p4": lambda: stage_2(tiny(4)),
    "parscale-tiny-frozen-p4": lambda: frozen_trunk(tiny(4)),
    "parscale-small-stage1": lambda: stage_1(small(1)),
    "parscale-small-stage2-p4": lambda: stage_2(small(4)),
    "parscale-small-frozen-p4": lambda: frozen_trunk(small(4)),
    "pararnn-tiny": pararnn_tiny,
    "pararnn-100m": pararnn_100m,
    "dense-100m": dense_100m,
    "multiverse-tiny": multiverse_tiny,
    "multiverse-tiny-sequential": lambda: sequential(multiverse_tiny()),
    "multiverse-small": multiverse_small,
    "multiverse-small-sequential": lambda: sequential(multiverse_small()),
    "multiverse-finetune": multiverse_finetune,
    **{
        f"throughput-{size}-p{p}": partial(throughput, size, p, 8, p)
        for size in ("0.9b", "1.8b")
        for p in (1, 4)
    },
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
      UserError: there is none; names the nearest ones.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
