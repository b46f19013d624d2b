"""Which parameters are decayed."""

import torch

from aligned_reid.device.optimizer import make_adam, parameters_of
from aligned_reid.model import AlignedReID


def test_norms_and_biases_are_decayed_as_asked(small_trunk):
    model = AlignedReID(3, pretrained="none", bnneck=True, pooling="gem")
    model.train_heads(local=False, identity=True)
    trained = {id(one) for one in model.parameters() if one.requires_grad}
    assert {id(one) for one in parameters_of(model)} == trained
    decayed, others = parameters_of(model, decay_norms=False)
    assert {id(one) for one in decayed["params"] + others["params"]} == trained
    names = {id(one): name for name, one in model.named_parameters()}
    assert {names[id(one)] for one in others["params"]} == {
        "base.bn1.weight",
        "base.bn1.bias",
        "base.conv2.bias",
        "pooling.p",
        "neck.weight",
    }
    optimizer = make_adam([decayed, others], lr=0.1, weight_decay=5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]


def test_a_decayed_weight_shrinks_and_another_does_not():
    decayed, kept = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = make_adam([{"params": [decayed]}, {"params": [kept], "weight_decay": 0.0}], lr=0.1, weight_decay=0.1)
    decayed.grad, kept.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert (decayed < 1).all()
    assert (kept == 1).all()
