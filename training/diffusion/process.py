"""The diffusion process: schedules, q(x_t | x_0), its posterior, parametrisations, the simple loss.

Only this module knows what the output of a network means ("x_0", "eps" or "v"); samplers and the
likelihood see `denoise(x_t, t) -> x_0`. Time t is an integer in 1..T as in Ho et al. 2020.
`alpha_bar[t]` is indexed by it and `alpha_bar[0]` is exactly 1, so t = 0 is the data.
Legend: B batch, T diffusion steps; x_0, x_t, eps, v have shape (B, ...) and t has shape (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import torch
from torch import Tensor

from training.sections.decoder_section import Parametrisation

PARAMETRISATIONS: tuple[Parametrisation, ...] = ("x_0", "eps", "v")

Prediction = Tensor | tuple[Tensor, Tensor]
"""A tensor; or, if the variance is learned, a pair of it and `fraction` in [0, 1], which
interpolates between the small variance (0) and the large one (1)."""

Denoise = Callable[[Tensor, Tensor], Prediction]
"""`denoise(x_t, t) -> x_0`: the expected data given the noised data, in a new tensor; t is int64
(B,)."""

Number = TypeVar("Number", float, Tensor)  # one float64 value, or a float64 tensor

BETA_MAX = 0.999  # clip of Nichol & Dhariwal 2021: beta = 1 in the last step would divide by zero
T_OF_DDPM = 1000  # the T that the usual betas of the linear schedule are meant for


@dataclass(frozen=True, eq=False)
class Schedule:
    """Share of the data's variance in x_t: `alpha_bar`, float64 (T + 1,).

    It falls strictly from exactly 1 at t = 0 and stays above 0. Raises ValueError with the first t
    where it does not.
    """

    alpha_bar: Tensor

    def __post_init__(self) -> None:
        alpha_bar = self.alpha_bar
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2 or alpha_bar.dtype != torch.float64:
            raise ValueError(
                f"alpha_bar is {alpha_bar.dtype} {tuple(alpha_bar.shape)}: pass a float64 vector "
                "of T + 1 values, T at least 1"
            )
        if alpha_bar[0] != 1:
            raise ValueError(
                f"alpha_bar[0] = {alpha_bar[0]:.6g}: it must be exactly 1, since t = 0 is the data"
            )
        bad = ~((alpha_bar[1:] > 0) & (alpha_bar[1:] < alpha_bar[:-1]))  # True for NaN too
        if bad.any():
            t = int(bad.nonzero()[0]) + 1
            raise ValueError(
                f"alpha_bar[{t}] = {alpha_bar[t]:.6g} after alpha_bar[{t - 1}] = "
                f"{alpha_bar[t - 1]:.6g}: "
                "alpha_bar must fall strictly and stay above 0; check the betas (each in (0, 1)) "
                "or use fewer steps"
            )

    @classmethod
    def from_betas(cls, beta: Tensor) -> Self:
        """Return the schedule of beta_1..beta_T, float64 (T,), each in (0, 1)."""
        return cls(torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)]))

    @classmethod
    def linear(cls, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Self:
        """Return the linear schedule of Ho et al. 2020: beta from 1e-4 to 0.02 over T = 1000.

        For another T the betas scale with 1000 / T, so that alpha_bar follows the same path.
        """
        scale = T_OF_DDPM / _positive(T)
        return cls.from_betas(
            torch.linspace(scale * beta_1, scale * beta_T, T, dtype=torch.float64).clamp(
                max=BETA_MAX
            )
        )

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008) -> Self:
        """Return the cosine schedule (Nichol & Dhariwal 2021, eq. 17).

        alpha_bar = f(t) / f(0) with f = cos^2; each beta is clipped at 0.999.
        """
        f = (
            torch.cos(
                (torch.linspace(0, 1, _positive(T) + 1, dtype=torch.float64) + s)
                / (1 + s)
                * (math.pi / 2)
            )
            ** 2
        )
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=BETA_MAX))

    @classmethod
    def constant(cls, rate: float, end: float = 1e-4) -> Self:
        """Return the schedule with one diffusion rate beta at every step (Sohl-Dickstein et al.
        2015).

        It has as many steps as alpha_bar needs to fall to `end`: T = ln(end) / ln(1 - rate),
        rounded up. A rate near 1 maps noise to data in one step, a low one is slow to sample.
        """
        if not (0 < rate < 1 and 0 < end < 1):
            raise ValueError(
                f"diffusion rate = {rate:g}, end = {end:g}: both must lie between 0 and 1"
            )
        T = max(1, math.ceil(math.log(end) / math.log1p(-rate) - 1e-9))
        return cls.from_betas(torch.full((T,), rate, dtype=torch.float64))

    def shifted(self, factor: float) -> "Schedule":
        """Return the schedule with SNR times factor^2 at every t (Hoogeboom et al. 2023, eq. 5).

        factor = 64 / side_px gives larger images more noise.
        """
        if not factor > 0:
            raise ValueError(
                f"shift = {factor:g}: it multiplies the noise level, so it must be positive"
            )
        log_snr = self.log_snr[1:] + 2 * math.log(factor)
        return Schedule(torch.cat([torch.ones(1, dtype=torch.float64), torch.sigmoid(log_snr)]))

    @property
    def T(self) -> int:  # noqa: N802
        """Number of diffusion steps; t runs over 1..T."""
        return len(self.alpha_bar) - 1

    @cached_property
    def sqrt_alpha_bar(self) -> Tensor:
        """Factor of x_0 in x_t, float64 (T + 1,)."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sqrt_one_minus_alpha_bar(self) -> Tensor:
        """Factor of eps in x_t, float64 (T + 1,)."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def log_snr(self) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)), float64 (T + 1,); infinite at t = 0."""
        return torch.logit(self.alpha_bar)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

        t = 0 returns x_0 itself.
        """
        _check(x_0, t, eps)
        check_t(t, self.T, lowest=0)
        return (at(self.sqrt_alpha_bar, t, x_0) * x_0).addcmul_(
            at(self.sqrt_one_minus_alpha_bar, t, x_0), eps
        )

    def draw_t(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw t uniformly from 1..T, int64 (count,), on the CPU."""
        return torch.randint(1, self.T + 1, (count,), generator=generator)


def _positive(T: int) -> int:
    if T < 1:
        raise ValueError(f"T = {T}: a schedule needs at least one step")
    return T


def _check(x: Tensor, t: Tensor, other: Tensor) -> None:
    if x.shape != other.shape or t.shape != x.shape[:1]:
        shapes = f"{tuple(x.shape)} and {tuple(other.shape)} with t {tuple(t.shape)}"
        raise ValueError(
            f"shapes {shapes}: the first two must be equal, and t one integer for each sample"
        )


def check_t(t: Tensor, T: int, lowest: int = 1) -> None:
    """Raise ValueError unless every t is an integer in lowest..T.

    On an accelerator the range is not checked here, which would wait for the device; the gather in
    `at` fails there instead.
    """
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"t is {t.dtype}: time is an integer in {lowest}..{T}")
    if t.device.type == "cpu" and t.numel() and not lowest <= int(t.min()) <= int(t.max()) <= T:
        raise ValueError(f"t spans {int(t.min())}..{int(t.max())}: it must lie in {lowest}..{T}")


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return the values of a float64 table (T + 1,) at t (B,) as (B, 1, ...), to multiply with
    `like`.

    `like` is (B, ...); the values are float32, or float64 if it is.
    """
    values = table.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
    return values.gather(0, t.to(like.device, torch.int64)).view(-1, *[1] * (like.ndim - 1))


def posterior_coefficients(
    alpha_bar_t: Number, alpha_bar_s: Number
) -> tuple[Number, Number, Number]:
    """Return the factors of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its variance, for s <
    t.

    Ho et al. 2020, eq. 6-7, for any pair of times.
    """
    alpha = alpha_bar_t / alpha_bar_s
    of_x_0 = alpha_bar_s**0.5 * (1 - alpha) / (1 - alpha_bar_t)
    of_x_t = alpha**0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return of_x_0, of_x_t, (1 - alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def posterior(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (B, ...) and variance (B, 1, ...) of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq.
    6-7).

    The variance is 0 at t = 1.
    """
    _check(x_0, t, x_t)
    check_t(t, schedule.T)
    of_x_0, of_x_t, variance = (at(table, t - 1, x_t) for table in posterior_tables(schedule))
    return (of_x_0 * x_0).addcmul_(of_x_t, x_t), variance


def posterior_tables(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Return `posterior_coefficients` for t = 1..T and s = t - 1, float64 (T,) each; entry t - 1 is
    for t.
    """
    return posterior_coefficients(schedule.alpha_bar[1:], schedule.alpha_bar[:-1])


def _check_parametrisation(parametrisation: str) -> None:
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(
            f"parametrisation = {parametrisation!r}: choose one of {', '.join(PARAMETRISATIONS)}"
        )


def training_target(
    schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, parametrisation: Parametrisation
) -> Tensor:
    """Return the tensor that a network must predict: x_0, eps or v.

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022).
    """
    _check_parametrisation(parametrisation)
    _check(x_0, t, eps)
    check_t(t, schedule.T, lowest=0)
    if parametrisation == "x_0":
        return x_0
    if parametrisation == "eps":
        return eps
    return (at(schedule.sqrt_alpha_bar, t, eps) * eps).addcmul_(
        at(schedule.sqrt_one_minus_alpha_bar, t, eps), x_0, value=-1
    )


def to_x_0(
    schedule: Schedule, x_t: Tensor, t: Tensor, prediction: Tensor, parametrisation: Parametrisation
) -> Tensor:
    """Return the x_0 that a prediction stands for; allocates at most one batch.

    From eps: (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar); from v: sqrt(alpha_bar) x_t -
    sqrt(1 - alpha_bar) v.
    """
    _check_parametrisation(parametrisation)
    _check(x_t, t, prediction)
    check_t(t, schedule.T, lowest=0)
    if parametrisation == "x_0":
        return prediction
    signal, noise = (
        at(schedule.sqrt_alpha_bar, t, x_t),
        at(schedule.sqrt_one_minus_alpha_bar, t, x_t),
    )
    if parametrisation == "eps":
        return (x_t / signal).addcmul_(noise / signal, prediction, value=-1)
    return (signal * x_t).addcmul_(noise, prediction, value=-1)


def to_eps(schedule: Schedule, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """Return the noise between x_0 and x_t: (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar); t >=
    1.
    """
    _check(x_t, t, x_0)
    check_t(t, schedule.T)
    signal, noise = (
        at(schedule.sqrt_alpha_bar, t, x_t),
        at(schedule.sqrt_one_minus_alpha_bar, t, x_t),
    )
    return (x_t / noise).addcmul_(signal / noise, x_0, value=-1)


def as_denoise(
    network: Callable[[Tensor, Tensor], Prediction],
    schedule: Schedule,
    parametrisation: Parametrisation,
    clip: float | None = None,
) -> Denoise:
    """Turn `network(x_t, t) -> prediction` into `denoise(x_t, t) -> x_0`.

    clip: clamp x_0 to [-clip, clip]. With guidance, pass `clip` to `guided` instead: the clamp must
    come after the extrapolation. A pair (prediction, fraction) becomes (x_0, fraction). `denoise`
    raises ValueError for a t that is not an integer in 1..T.
    """
    _check_parametrisation(parametrisation)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        check_t(t, schedule.T)
        prediction, fraction = split(network(x_t, t))
        x_0 = to_x_0(schedule, x_t, t, prediction, parametrisation)
        if clip is not None:
            x_0 = clipped(x_0, clip, is_new=x_0 is not prediction)
        return x_0 if fraction is None else (x_0, fraction)

    return denoise


def clipped(x_0: Tensor, limit: float, is_new: bool = True) -> Tensor:
    """Clamp x_0 (B, ...) to [-limit, limit]; in place if `is_new`.

    A sample with a value that is not finite becomes NaN everywhere. A clamp alone would turn an
    infinity into a bright pixel, and a check here would wait for an accelerator; samplers check for
    NaN later.
    """
    lost = x_0.sum(
        tuple(range(1, x_0.ndim)), keepdim=True, dtype=torch.promote_types(x_0.dtype, torch.float32)
    ).mul_(0)  # 0 or NaN
    return (x_0.clamp_(-limit, limit) if is_new else x_0.clamp(-limit, limit)).add_(lost)


def split(prediction: Prediction) -> tuple[Tensor, Tensor | None]:
    """Return a prediction and its variance fraction; the fraction is None if the variance is not
    learned.
    """
    return prediction if isinstance(prediction, tuple) else (prediction, None)


def snr_weight(
    schedule: Schedule,
    t: Tensor,
    ceiling: float = 5.0,
    floor: float = 0.0,
    parametrisation: Parametrisation = "eps",
) -> Tensor:
    """Return a weight (B,) for the squared error of each sample.

    With it, every parametrisation has the x_0 loss clamp(SNR, floor, ceiling) |x_0 - x_0'|^2. The
    ceiling is min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, section 3.4): divided by SNR for
    eps, by SNR + 1 for v. The floor is the truncated weight of Salimans & Ho 2022 (arXiv
    2202.00512, section 4, with 1): without it the noisiest steps, which decide the layout of a
    conditional image, have almost no weight.
    """
    _check_parametrisation(parametrisation)
    check_t(t, schedule.T)
    snr = schedule.log_snr.exp()
    per = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[parametrisation]
    return (snr.clamp(floor, ceiling) / per).float().to(t.device)[t]


def simple_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error over the batch, float32 (Ho et al. 2020, eq. 14).

    weight: factor (B,) of the error of each sample.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: the shapes "
            "must be equal"
        )
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    return (error if weight is None else weight * error).mean()
