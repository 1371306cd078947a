"""The rows, in the order in which they are measured. Another one is one line here."""

from __future__ import annotations

from aft.clip.attention import unfold_attention
from aft.clip.matmul import torchs_products
from aft.clip.patches import embed_by_convolution
from bench.speed import compilation, counts, evaluation, processes, startup, tricks
from bench.speed.row import Row, Target
from bench.speed.setting import BASE, MINI, tiny
from bench.speed.training import bound, cache_teacher, extra_pass, text_each_step

NEVER_SLOWER = Target("at least", 1.0)
NEAR_THE_BOUND = Target("at most", 1.15), Target("at most", 1.05)  # on a GPU

ROWS: tuple[Row, ...] = (
    Row("step", "TeCoA step / (2 x forward and input gradient + forward and backward), MiniCLIP-32", bound(MINI, 64, 2, 20),
        *NEAR_THE_BOUND),
    Row("step_whole", "the same with AdamW on both sides; clipping, logging and Lightning in ours", bound(MINI, 64, 2, 20, whole=True),
        *NEAR_THE_BOUND),
    Row("step_b32", "TeCoA step / its bound, ViT-B/32 at 224 px, batch 8", bound(BASE, 8, 2, 20), *NEAR_THE_BOUND),
    Row("step_b32_whole", "the same with AdamW on both sides; clipping, logging and Lightning in ours",
        bound(BASE, 8, 2, 20, whole=True), *NEAR_THE_BOUND),
    Row("tecoa_200", "loop as TeCoA's / our step, 10 attack steps, batch 256, 200 classes", text_each_step(tiny, 200, 256, 10, 20),
        Target("at least", 1.7)),
    Row("tecoa_1000", "loop as TeCoA's / our step, 10 attack steps, batch 256, 1,000 classes", text_each_step(tiny, 1000, 256, 10, 10),
        Target("at least", 4.0)),
    Row("fare", "loop as FARE's / our step, 10 attack steps, MiniCLIP-32", extra_pass(MINI, 64, 10, 20), NEVER_SLOWER,
        Target("at least", 1.5)),
    Row("fare_b32", "loop as FARE's / our step, 2 attack steps, ViT-B/32 at 224 px, batch 8", extra_pass(BASE, 8, 2, 20), NEVER_SLOWER,
        Target("at least", 1.5)),
    Row("held", "bytes held in an attack step / with trainable weights, MiniCLIP-32", counts.held_by_attack(MINI, 32),
        Target("at most", 0.7)),
    Row("held_b32", "bytes held in an attack step / with trainable weights, ViT-B/32", counts.held_by_attack(BASE, 2),
        Target("at most", 0.7)),
    Row("calls", "encoder calls of a step off the table, all methods", counts.encoder_calls, Target("exactly", 0), unit="calls"),
    Row("broken", "forwards of four attacks on an image that is broken at once, eps 0.5", evaluation.broken_at_once,
        Target("at most", 12), unit="calls"),
    Row("broken_usual", "the same at eps 4/255, each image that APGD-CE breaks", evaluation.broken_usual, unit="calls"),
    Row("robust_share", "forwards of all four attacks, ours / AutoAttack's own, half of the images robust", evaluation.by_share),
    Row("along_shares", "forwards of APGD-CE and APGD-T at several robust shares / the line between none and all",
        evaluation.along_shares),
    Row("start_up", "python train.py to the end of the first step, MiniCLIP-32", startup.start_up, Target("at most", 15), unit="s"),
    Row("data_wait", "share of a run's seconds that wait for data, sample data", startup.data_wait, Target("at most", 0.03)),
    Row("two_gradients", "two processes against one: largest difference of gradients / largest entry, float64",
        processes.same_gradients, Target("at most", 1e-10)),
    Row("two_overhead", "twice a step of two processes / a step of one, same global batch, one thread each", processes.overhead),
    Row("folded", "attack's pass with torch's attention / with ours, MiniCLIP-32, torch's products",
        tricks.undone(unfold_attention, MINI, 64, 20, torchs_products)),
    Row("folded_b32", "the same, ViT-B/32, batch 8", tricks.undone(unfold_attention, BASE, 8, 5, torchs_products)),
    Row("patches", "attack's pass, patches by a convolution / by a product, MiniCLIP-32",
        tricks.undone(embed_by_convolution, MINI, 64, 20)),
    Row("patches_b32", "the same, ViT-B/32, batch 8", tricks.undone(embed_by_convolution, BASE, 8, 10)),
    Row("cache_teacher", "FARE's step, teacher asked / its encodings kept, 2 attack steps, MiniCLIP-32",
        cache_teacher(lambda: MINI, 64, 2, 20)),
    Row("onednn", "attack's pass, fp32 products of torch / by oneDNN, MiniCLIP-32", tricks.onednn),
    Row("bf16", "attack's pass, fp32 / bf16 autocast, MiniCLIP-32", tricks.bf16),
    Row("channels_last", "attack's pass, usual order / channels last, ResNet-50, batch 4", tricks.channels_last),
    Row("fused", "AdamW's step by default / fused, weights of a ViT-B/32", tricks.fused),
    Row("compiled", "attack's pass, eager / compiled, MiniCLIP-32, torch's products", compilation.compiled),
)  # fmt: skip
