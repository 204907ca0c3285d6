"What the tests of PyTorch's contract have to know about each optimizer: a `Kind` with its settings, errors and state."

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)

import sgd_sai.adahessian
import sgd_sai.adan_kernels
import sgd_sai.kernels
from sgd_sai.adahessian import AdaHessian
from sgd_sai.adan import Adan
from sgd_sai.muon_sai import MuonSaI
from sgd_sai.sgd_sai import SGD_sai, SGDSaI


@dataclass(frozen=True)
class Kind:
    "What the checks have to know about an optimizer."

    cls: type
    module: ModuleType  # where the functions that make its step live
    table: Callable  # () -> description -> keyword arguments, without the flags that choose an implementation
    errors: Callable  # (error, parameters on the device) -> its own error inputs
    like: type  # the optimizer of PyTorch that it is to take the place of
    released: tuple  # arguments that the authors' class has too
    gentle: dict  # for small steep problems, where the input says nothing else
    number: str  # entry of the state that files may hold as a number or as a tensor; "": there is none
    average: str  # entry of the state that is a tensor of the parameter's shape
    states: Callable  # keyword arguments, number of dimensions -> the entries of the state after a step
    loop: dict = field(default_factory=dict)  # flags that choose the plain loop
    flags: tuple = ()  # flags that choose other implementations
    supports: tuple = ()  # foreach, differentiable, fused
    capturable: bool = False
    create_graph: bool = False
    state_dtype: bool = True  # averages may have another dtype than parameters
    attributes: frozenset = frozenset()  # public ones besides those of every optimizer

    def optim_inputs(self, device, dtype=None):
        return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in self.table().items()]

    def capturable_inputs(self, device, dtype=None):
        "As above with `capturable`, which excludes a fused kernel."
        if not self.capturable:
            return []
        return [
            OptimizerInput(params=None, kwargs={**i.kwargs, "capturable": True}, desc=f"{i.desc} & capturable")
            for i in self.optim_inputs(device)
        ]

    def inputs(self, device):
        return self.optim_inputs(device) + self.capturable_inputs(device)

    @property
    def own_flags(self):
        "Arguments that the authors' class does not have."
        return tuple(
            name
            for name in inspect.signature(self.cls).parameters
            if name not in self.released and name != "process_group"
        )

    def info(self, inputs, supports):
        like = next(info for info in optim_db if info.optim_cls is self.like)
        return OptimizerInfo(
            self.cls,
            optim_inputs_func=inputs,
            optim_error_inputs_func=self.error_inputs,
            supported_impls=supports,
            scheduler_inputs=like.scheduler_inputs,
            not_og_supported_flags=self.own_flags,
            supports_sparse=False,
            has_capturable_arg=self.capturable,
            supports_complex=not self.create_graph,
            supports_fused_on=("cpu", "cuda"),
        )

    @property
    def schedulers(self):
        return self.info(self.optim_inputs, self.supports).scheduler_inputs

    def all_inputs(self, device, skip=("differentiable",)):
        "Every input with every implementation that goes with it."
        infos = [
            self.info(self.optim_inputs, self.supports),
            self.info(self.capturable_inputs, tuple(s for s in self.supports if s != "fused")),
        ]
        full = [
            given
            for info in infos
            for given in _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info, skip=skip)
        ]
        return [
            given for given in full if not (given.kwargs.get("differentiable") and given.kwargs.get("restart_radius"))
        ]

    def error_inputs(self, device, dtype):
        "What PyTorch demands of every optimizer, and errors of its own hyperparameters."

        def error(match, error_type=ValueError, params=None, error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR, **kwargs):
            params = [Parameter(torch.randn(2, 2, device=device, dtype=dtype))] if params is None else params
            return ErrorOptimizerInput(
                OptimizerInput(params=params, kwargs=kwargs, desc=match),
                error_on=error_on,
                error_type=error_type,
                error_regex=match,
            )

        sparse = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
        sparse.grad = torch.randn(2, 2, device=device, dtype=dtype).to_sparse()
        infinite = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
        infinite.grad = torch.full_like(infinite, torch.inf)
        return (
            get_error_inputs_for_all_optims(device, dtype)
            + [
                error("Invalid learning rate: -0.1", lr=-0.1),
                error("Invalid learning rate: nan", lr=float("nan")),
                error("Invalid weight_decay value: -1", weight_decay=-1),
                error("Invalid epsilon value: -1e-08", eps=-1e-8),
                *([error("Invalid state_dtype value: torch.int32", state_dtype=torch.int32)] * self.state_dtype),
                error(
                    "Invalid weight_decay value: -2",
                    params=[{"params": [infinite]}, {"params": [sparse], "weight_decay": -2}],
                ),
                error("does not support sparse gradients", RuntimeError, [sparse], OptimizerErrorEnum.STEP_ERROR),
            ]
            + self.errors(error, infinite)
        )

    def slowly(self, kwargs):
        return {**self.gentle, **kwargs}

    def backward(self, loss):
        loss.backward(create_graph=self.create_graph)

    def give(self, p, g):
        "Let `g` be the gradient of p; where a graph is needed, that of a loss with curvature 1 everywhere."
        g = None if g is None else g.detach()
        p.grad = g + (p - p.detach()) if self.create_graph and g is not None else g

    @property
    def implementations(self):
        "Flags for each implementation there is."
        return [self.loop, *self.flags]


def sgdsai_table():
    "Those of SGD where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=2e-3),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "non-zero weight_decay": dict(weight_decay=0.5),
        "no weight_decay": dict(weight_decay=0.0),
        "no momentum": dict(momentum=0.0),
        "momentum": dict(momentum=0.5),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
        "nesterov & maximize": dict(nesterov=True, maximize=True),
        "sqrt_numel": dict(scale="sqrt_numel", weight_decay=0.0),
        "normalize": dict(normalize=True, lr=5e-3),
        "max_ratio": dict(max_ratio=None),
        "eps": dict(eps=1e-4),
    }


def sgdsai_errors(error, infinite):
    return [
        error("Invalid momentum value: -0.5", momentum=-0.5),
        error("Invalid momentum value: 1.0", momentum=1.0),
        error("Nesterov momentum requires a momentum", nesterov=True, momentum=0),
        error("Invalid scale: 'sqrt'", scale="sqrt"),
        error("Invalid max_ratio value: 0.5", max_ratio=0.5),
        error("`fused` and `foreach` cannot be `True` together", RuntimeError, fused=True, foreach=True),
        error("`fused` does not support `differentiable`", RuntimeError, fused=True, differentiable=True),
        error("`foreach` does not support `differentiable`", RuntimeError, foreach=True, differentiable=True),
        error("`fused` does not support `capturable`", RuntimeError, fused=True, capturable=True),
        error(
            "`fused=True` requires all the params to be floating point",
            RuntimeError,
            [torch.zeros(2, dtype=torch.complex64)],
            fused=True,
        ),
        error("is not finite", RuntimeError, [infinite], OptimizerErrorEnum.STEP_ERROR),
    ]


def adan_table():
    "Those of AdamW where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=0.01),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "non-zero weight_decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "no_prox": dict(no_prox=True, weight_decay=0.1),
        "betas": dict(betas=(0.9, 0.5, 0.95)),
        "no averages": dict(betas=(0.0, 0.0, 0.0), eps=1e-3),
        "eps": dict(eps=1e-4),
        "restart_radius": dict(restart_radius=1e3),
        "rounding": dict(rounding="nearest"),
    }


def adan_errors(error, infinite):
    return [
        error("Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9, 0.9)),
        error("Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1, 0.9)),
        error("Invalid beta parameter at index 2: nan", betas=(0.9, 0.9, float("nan"))),
        error("3 are needed", betas=(0.9, 0.999)),
        error("Invalid restart_radius value: -1", restart_radius=-1),
        error("Invalid rounding: 'up'", rounding="up"),
        error("Invalid state_dtype value: torch.int8", state_dtype=torch.int8),
        error("`capturable` supports neither", RuntimeError, rounding="stochastic", capturable=True),
        error("`differentiable` supports neither", RuntimeError, rounding="kahan", differentiable=True),
        error("`foreach` does not support `differentiable`", RuntimeError, foreach=True, differentiable=True),
        error(
            "`restart_radius` does not support `differentiable`", RuntimeError, restart_radius=1.0, differentiable=True
        ),
        error(
            "`differentiable` does not support complex parameters",
            RuntimeError,
            [torch.zeros(2, dtype=torch.complex64)],
            differentiable=True,
        ),
        error("unexpected keyword argument 'max_grad_norm'", TypeError, max_grad_norm=1.0),
    ]


def adahessian_table():
    "Those of AdamW where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=0.05),
        "tensor lr": dict(lr=torch.tensor(0.05)),
        "non-zero weight_decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "betas": dict(betas=(0.5, 0.9)),
        "eps": dict(eps=1e-2),
        "hessian_power": dict(hessian_power=0.5, weight_decay=0.1),
        "n_samples": dict(n_samples=2, seed=1),
        "update_period": dict(update_period=2),
        "block_size": dict(block_size=4, signed_average=True),
    }


def adahessian_errors(error, infinite):
    forgotten = Parameter(torch.randn_like(infinite))
    forgotten.grad = torch.randn_like(infinite)
    return [
        error("Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
        error("Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1)),
        error("2 are needed", betas=(0.9, 0.9, 0.9)),
        error("Invalid hessian_power value: 1.5", hessian_power=1.5),
        error("Invalid n_samples value: 0", n_samples=0),
        error("Invalid update_period value: 0", update_period=0),
        error("Invalid block_size value: 1.5", block_size=1.5),
        error("does not support complex parameters", params=[torch.zeros(2, dtype=torch.complex64)]),
        error(r"call loss\.backward\(create_graph=True\)", RuntimeError, [forgotten], OptimizerErrorEnum.STEP_ERROR),
    ]


SGDSAI = Kind(
    SGDSaI,
    sgd_sai.kernels,
    sgdsai_table,
    sgdsai_errors,
    like=SGD,
    released=tuple(inspect.signature(SGD_sai).parameters),
    gentle=dict(lr=1e-3),
    number="gsnr",
    average="momentum_buffer",
    states=lambda kwargs, ndim: {"gsnr"} if kwargs.get("momentum") == 0 else {"gsnr", "momentum_buffer"},
    loop=dict(foreach=False, fused=False),
    flags=({}, dict(foreach=True), dict(fused=True), dict(capturable=True), dict(capturable=True, foreach=True)),
    supports=("foreach", "differentiable", "fused"),
    capturable=True,
)


ADAN = Kind(
    Adan,
    sgd_sai.adan_kernels,
    adan_table,
    adan_errors,
    like=AdamW,
    released=("params", "lr", "betas", "eps", "weight_decay", "no_prox", "foreach"),
    gentle=dict(lr=1e-3),
    number="step",
    average="exp_avg",
    states=lambda kwargs, ndim: (
        {"step", "exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"}
        | ({"path"} if "restart_radius" in kwargs else set())
    ),
    loop=dict(foreach=False),
    flags=({}, dict(foreach=True), dict(capturable=True), dict(capturable=True, foreach=True)),
    supports=("foreach", "differentiable"),
    capturable=True,
)


ADAHESSIAN = Kind(
    AdaHessian,
    sgd_sai.adahessian,
    adahessian_table,
    adahessian_errors,
    like=AdamW,
    released=("params", "lr", "betas", "eps", "weight_decay", "hessian_power"),
    gentle=dict(lr=0.02, eps=0.1),
    number="step",
    average="exp_avg",
    states=lambda kwargs, ndim: {"step", "hessian_step", "exp_avg", "exp_hessian_diag_sq"},
    create_graph=True,
)


def by_dimension(params, marks):
    "Groups for MuonSaI of parameters, or groups, that nobody has marked: those of two or more dimensions get `marks`."
    if isinstance(params, torch.Tensor):
        return params
    params = list(params)
    groups = params if any(isinstance(p, dict) for p in params) else [{"params": params}]
    marked = []
    for group in groups:
        given = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        for is_matrix, run in itertools.groupby(given, lambda p: (p[1] if isinstance(p, tuple) else p).ndim >= 2):
            marked.append({**group, "params": list(run), **(marks if is_matrix else {"muon": False})})
    return marked


def sorted_muon(name, marks, **rest):
    "MuonSaI as the checks build optimizers: from parameters, or from groups without marks."

    @functools.wraps(MuonSaI.__init__)
    def init(self, params, *args, **kwargs):
        MuonSaI.__init__(self, by_dimension(params, marks), *args, **(rest | kwargs))

    return type(name, (MuonSaI,), {"__init__": init})


def muonsai_table():
    "Those of Muon where they exist here, and those of SGDSaI."
    return {
        "default": {},
        "non-default lr": dict(lr=2e-3),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "non-zero weight_decay": dict(weight_decay=0.5),
        "no weight_decay": dict(weight_decay=0.0),
        "no momentum": dict(momentum=0.0, nesterov=False),
        "momentum": dict(momentum=0.5),
        "momentum of the rest": dict(rest_momentum=0.5),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "not nesterov": dict(nesterov=False, weight_decay=0.1),
        "match_rms_adamw": dict(adjust_lr="match_rms_adamw"),
        "spectral_unclamped": dict(adjust_lr="spectral_unclamped"),
        "iterations": dict(ns_steps=8, ns_coefficients="polar_express"),
        "coefficients": dict(ns_steps=2, ns_coefficients=(2.0, -1.5, 0.5)),
        "sqrt_numel": dict(scale="sqrt_numel", weight_decay=0.0),
        "max_ratio": dict(max_ratio=None),
        "eps": dict(eps=1e-4),
        "rounding": dict(rounding="nearest"),
    }


def muonsai_errors(error, infinite):
    return [
        error("Invalid momentum value: -0.5", momentum=-0.5),
        error("Invalid momentum value: 1.0", rest_momentum=1.0),
        error("Invalid learning rate: -0.1", rest_lr=-0.1),
        error("got rest_lr and sai_lr", TypeError, rest_lr=0.1, sai_lr=0.1),
        error("Nesterov momentum requires a momentum", momentum=0),
        error("Invalid scale: 'sqrt'", scale="sqrt"),
        error("Invalid max_ratio value: 0.5", max_ratio=0.5),
        error("Invalid rest: 'adam'", rest="adam"),
        error("Invalid adjust_lr: 'rms'", adjust_lr="rms"),
        error("Invalid ns_steps value: 0", ns_steps=0),
        error("Invalid ns_coefficients: 'newton'", ns_coefficients="newton"),
        error("Invalid ns_coefficients", ns_coefficients=(1.0, 2.0)),
        error("Invalid rounding: 'up'", rounding="up"),
        error("`capturable` supports neither", RuntimeError, rounding="stochastic", capturable=True),
        error("`fused` and `foreach` cannot be `True` together", RuntimeError, fused=True, foreach=True),
        error("`fused` does not support `capturable`", RuntimeError, fused=True, capturable=True),
        error("has to consist of real matrices", params=[torch.zeros(2, 2, dtype=torch.complex64)]),
        error("unexpected keyword argument 'differentiable'", TypeError, differentiable=True),
        error("does not support differentiable", params=[{"params": [infinite], "differentiable": True}]),
        error("does not support normalize", params=[{"params": [infinite], "normalize": True}]),
        error("is not finite", RuntimeError, [infinite], OptimizerErrorEnum.STEP_ERROR),
    ]


MUONSAI = Kind(
    sorted_muon("SortedMuonSaI", {"muon": True}, rest="sgd_sai", weight_decay=0.01),
    sgd_sai.kernels,
    muonsai_table,
    muonsai_errors,
    like=SGD,
    released=(
        *("params", "lr", "sai_lr", "weight_decay", "momentum", "sai_momentum", "nesterov", "matrices", "eps"),
        *("rest", "rest_lr", "rest_momentum", "roles", "by_head"),  # what sorts and fills groups, and stands in none
    ),
    gentle=dict(lr=1e-3),
    number="gsnr",
    average="momentum_buffer",
    states=lambda kwargs, ndim: {"momentum_buffer"} if ndim >= 2 else {"gsnr", "momentum_buffer"},
    loop=dict(foreach=False, fused=False),
    flags=({}, dict(foreach=True), dict(capturable=True), dict(capturable=True, foreach=True)),
    supports=("foreach",),
    capturable=True,
    attributes=frozenset({"rest_options", "reasons"}),
)


def rest_table():
    "What the rules of the rest have; none has a scale, and Nesterov's form is part of the rule."
    return {
        "default": {},
        "non-default lr": dict(lr=2e-3),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "rate of the rest": dict(rest_lr=1e-3),
        "non-zero weight_decay": dict(weight_decay=0.5),
        "no weight_decay": dict(weight_decay=0.0),
        "momentum of the rest": dict(rest_momentum=0.5),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "eps": dict(eps=1e-4),
        "momentum of the matrices": dict(momentum=0.5),
        "rounding": dict(rounding="nearest"),
    }


def rest_errors(error, infinite):
    return [
        error("Invalid momentum value: -0.5", momentum=-0.5),
        error("Invalid momentum value: 1.0", rest_momentum=1.0),
        error("Invalid learning rate: -0.1", rest_lr=-0.1),
        error("`capturable` supports neither", RuntimeError, rounding="stochastic", capturable=True),
        error("`fused` is not supported by rest", RuntimeError, fused=True),
        error("does not support differentiable", params=[{"params": [infinite], "differentiable": True}]),
        error("is not finite", RuntimeError, [infinite], OptimizerErrorEnum.STEP_ERROR),
    ]


def row_norm_errors(error, infinite):
    no_rows = [torch.zeros(2, 2, dtype=torch.complex64)]
    return [*rest_errors(error, infinite), error("does not support complex parameters", params=no_rows)]


def adams_errors(error, infinite):
    return [*rest_errors(error, infinite), error("divides by zero without eps", eps=0.0)]


def of_rest(rest, errors=rest_errors, role="embedding"):
    "MuonSaI with no hidden matrix: all parameters are stepped by its rest; those of two dimensions have this role."
    return replace(
        MUONSAI,
        cls=sorted_muon(f"MuonSaI_{rest}_{role}", {"muon": False, "role": role}, rest=rest),
        table=rest_table,
        errors=errors,
        number="",
        states=lambda kwargs, ndim: {"momentum_buffer"},
        loop=dict(foreach=False),
    )


SIGN, ADAMS, ROW_NORM = of_rest("sign"), of_rest("adams", adams_errors), of_rest("row_norm", row_norm_errors)
SCION = of_rest("scion", row_norm_errors), of_rest("scion", role="head")
MUON_KINDS = (MUONSAI, SIGN, ROW_NORM, ADAMS, *SCION)
