"""PyTorch's own optimizer checks, for SGDSaI, Adan, AdaHessian and MuonSaI, in the files test_torch_*.py.

They have the test names of PyTorch's test/test_optim.py (TestOptimRenewed) and of its tests of differentiable
optimizers, and the inputs of torch.testing._internal.common_optimizers. Each check runs on the CPU, and on CUDA where
there is one. What the checks have to know about an optimizer stands in a `Kind`, in torch_kinds.py. The test below
looks whether every check of PyTorch has a counterpart.

What is skipped or differs, and in brackets why. For all four:

- test_rosenbrock_sparse: the error is checked (sparse gradients are refused by design: G is a statistic of the
  whole tensor, averages over time would be dense, and there is no sparse curvature)
- test_second_order_optims_return_consistent_types: no such test (for optimizers that need a closure)
- test_cpu_load_state_dict: only on CUDA, as for SGD (a state that comes from the CPU has to arrive on the device)
- multigpu, test_mixed_device_dtype: need two GPUs; a version with mixed dtypes on one device runs everywhere (as in
  PyTorch)
- test_peak_memory_foreach: CUDA, as in PyTorch (its limit is about the CUDA allocator; test_authors.py and
  test_adan.py have stricter ones for the CPU)
- test_foreach_large_tensor: gradients are random instead of zero (with zero gradients nothing starts, or moves, so
  nothing would be tested)
- capturable inputs: run on the CPU too (stricter: they are supported there)
- test_can_load_older_state_dict, test_can_load_from_to_named_state_dict: the loss is a sum of squares, not of cubes
  (which has no minimum: with the rates of these optimizers the gradients overflow within the check, and MuonSaI
  refuses them)

SGDSaI (SGD's own list has no skips outside of torch.compile's test mode):

- test_complex, test_complex_2d: the real twin gets the complex tensor's scales by `set_scales` (G of a complex
  tensor is made of n moduli; the update, which is element-wise, is still compared exactly)
- test_load_nontensor_step: the number that may be tensor or float is `gsnr` (there is no `step` in the state)
- test_defaults_changed_to_foreach: looks for the function `_foreach` on CUDA, and for `_fused` on the CPU (names
  differ; on the CPU the fused kernel is the default)
- test_fused_does_not_step_if_foundinf, test_grad_scaling_autocast_fused_optimizers: through GradScaler alone (the
  fused kernel is called chunk by chunk without found_inf; the scaler unscales and skips the step itself)
- test_fused_large_tensor: on the CPU the sizes given to the kernel are checked (the CPU kernel is only given
  chunks)
- the checks of the loss's direction: lr 1e-3, SGD's default, where the input gives none (lr is multiplied by G
  here, and the momentum starts with the whole first gradient)

Adan:

- test_fused_*: none (there is no fused kernel)
- test_defaults_changed_to_foreach: looks for `_foreach` on CUDA and for small tensors, for `_for_loop` for large
  tensors on the CPU (names differ; the loop goes through large tensors in chunks that stay in the cache)
- test_grad_scaling_autocast_fused_optimizers: with foreach and the loop (the check is about GradScaler, which every
  optimizer meets)
- inputs with restart_radius: not with `differentiable`, not in a CUDA graph (refused; the criterion is looked at by
  the host)

AdaHessian:

- all: backward(create_graph=True); where PyTorch assigns gradients, they get a graph that says curvature 1 (the
  step needs the graph of the gradients)
- test_foreach_*, test_fused_*, test_mixed_device_dtype, test_peak_memory_foreach, test_differentiable*,
  test_cuda_graph_equals_eager: none (it has no foreach, fused, differentiable or capturable form: the extra
  backward pass outweighs the step, and its graph is new each time)
- test_complex, test_complex_2d: the error is checked, in test_errors (complex parameters are refused: whether real
  and imaginary part share a curvature is not defined)
- test_grad_scaling_autocast_fused_optimizers: without unscale_ and clipping (refused, see test_adahessian.py)
- the checks of the loss's direction: lr 0.02, eps 0.1, where the input gives none (one draw of signs can make a
  curvature of next to nothing, and the steps of the default 0.15 are Newton's)

MuonSaI, once with its default rest and all matrices hidden, and once for each rule of the rest with all parameters
stepped by it, as embeddings (Scion's also as a head):

- all: through classes that mark parameters by their dimensions, and cut groups where they meet (MuonSaI is given a
  model or marked groups; without marks it raises, see test_muon_groups.py)
- test_tensor_lr_is_followed_when_it_changes: the lr of every group is changed, for all optimizers (a tensor lr is one
  for all groups, as in PyTorch)
- test_load_nontensor_step: parameters are vectors, for all optimizers (a matrix has no number in its state); none for
  the other rules (their state has no number: it is the momentum alone)
- test_can_load_from_to_named_state_dict: names are compared over all groups (there are two)
- test_deepcopy_copies_all_public_attrs: `rest_options` and `reasons` are copied as well (what `add_param_group` gives
  to later groups, and what `role_table` says of roles)
- test_differentiable*: the error is checked, in test_errors (not offered)
- test_complex, test_complex_2d: for the rules "sign" and "adams", which are element-wise; for the others the error is
  checked, in test_errors (neither the orthogonal factor nor the size of a row is offered for complex numbers; the
  default rest is SGDSaI's kernel)
- test_foreach_matches_forloop: as for SGDSaI; test_fused_*, test_defaults_changed_to_foreach: none, and no inputs with
  `fused` (the flags are about the parameters that are no matrices. With the default rest they reach the same kernels as
  in SGDSaI, test_muon_matrices.py has a step with each; the other rules have no fused kernel, test_errors)
- test_mixed_device_dtype: for the rules "sign", "row_norm" and "adams", without `fused`
- test_cuda_graph_equals_eager, test_peak_memory_foreach: none here (test_muon_rest.py measures the memory of a step)
- the checks of the loss's direction: lr 1e-3, as for SGDSaI"""

import re
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch_contract import contract, only_cpu
from torch_kinds import ADAHESSIAN, ADAN, MUON_KINDS, SGDSAI

pytestmark = contract


@only_cpu
def test_every_check_of_pytorch_has_a_counterpart_here(device):
    there = """
        optim_infos_do_not_specify_global_cliquey_kwargs errors forloop_goes_right_direction
        forloop_goes_right_direction_multigpu param_group_with_lrscheduler_goes_right_direction tensor_lr
        rosenbrock_sparse complex complex_2d foreach_matches_forloop mixed_device_dtype
        set_default_dtype_works_with_foreach foreach_large_tensor peak_memory_foreach fused_matches_forloop
        fused_error_on_params_on_meta fused_large_tensor fused_does_not_step_if_foundinf cpu_load_state_dict
        param_groups_weight_decay param_groups_lr step_is_noop_when_params_have_no_grad step_is_noop_for_zero_grads
        optimizer_can_be_printed state_dict_deterministic can_load_older_state_dict can_load_from_to_named_state_dict
        save_load_equality_with_weights_only load_nontensor_step state_dict_with_cuda_params state_dict_pre_hook
        state_dict_post_hook state_dict_pre_post_hook load_state_dict_pre_hook_and_prepend load_state_dict_post_hook
        load_state_dict_pre_post_hook step_post_hook step_pre_hook step_all_hooks deepcopy_copies_all_public_attrs
        fused_cpu_matches_cuda defaults_changed_to_foreach non_empty_state
    """.split()
    files = Path(__file__).parent.glob("test_torch_*.py")
    here = {name for file in files for name in re.findall(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)}
    missing = [name for name in there if name not in here]
    assert (
        not missing
        and all(isinstance(kind.cls([torch.ones(1)]), Optimizer) for kind in (SGDSAI, ADAN, ADAHESSIAN, *MUON_KINDS))
        and re.match(r"\d+\.\d+", torch.__version__)
    )
