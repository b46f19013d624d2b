"""Mixed precision: which operators run in the half type and which in float32, as in torch_npu's AutoCastOps.cpp."""

import functools

import torch

from torch_npu.operators import convert

HALF = """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
    prelu addmm addmv addr matmul einsum mm mv linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    scaled_dot_product_attention"""
FLOAT = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
    native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss cosine_embedding_loss
    nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
    dist pdist cdist renorm logsumexp prod softmax log_softmax cumprod cumsum linalg_vector_norm
    linalg_matrix_norm sum norm"""

_this_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_libraries = []


def register() -> None:
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([everything, own])
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, to_half in ((HALF, True), (FLOAT, False)):
        for packet in (getattr(torch.ops.aten, name) for name in names.split()):
            for operator in (getattr(packet, one) for one in packet.overloads()):
                has_out = any(argument.is_out for argument in operator._schema.arguments)
                if not has_out and "Dimname" not in str(operator._schema):
                    own.impl(operator, functools.partial(_run, operator, to_half), "AutocastPrivateUse1")


def _run(operator, to_half, *args, **kwargs):
    wanted = torch.get_autocast_dtype("npu") if to_half else torch.float32

    def cast(value):
        is_npu = isinstance(value, torch.Tensor) and value.device.type == "npu" and value.is_floating_point()
        return value.to(wanted) if is_npu and value.dtype not in (wanted, torch.float64) else value

    with torch._C._ExcludeDispatchKeyGuard(_this_key):
        return operator(*[convert(cast, one) for one in args], **{key: convert(cast, v) for key, v in kwargs.items()})
