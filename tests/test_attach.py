"""attach(): what each parameter becomes, groups, and every argument that is out of range."""

import math

import pytest
import torch
from models import Mixed, attached, mlp
from torch import nn

import gradlr
from gradlr import ArgumentError, AttachError, Fixed, LossTracker
from gradlr.rules import Adam, LowRankPolar


def kinds(opt):
    return {record.plan.name: record.plan.kind for record in opt.records}


def test_every_parameter_becomes_what_its_module_says():
    _, _, opt = attached(Mixed())
    assert kinds(opt) == {
        "embedding.weight": "embedding",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "conv.weight": "matrix",
        "conv.bias": "vector",
        "mix.weight": "matrix",
        "mix.bias": "vector",
        "head.weight": "embedding",
    }


def test_a_convolution_is_folded_and_attention_is_three_matrices():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 5), "attention": nn.MultiheadAttention(16, 2)})
    _, _, opt = attached(model)
    shapes = {record.plan.name: tuple(record.plan.shape) for record in opt.records}
    assert shapes["conv.weight"] == (8, 75)
    assert shapes["attention.in_proj_weight"] == (3, 16, 16)
    assert shapes["attention.out_proj.weight"] == (16, 16)


def test_a_square_layer_is_no_table_only_because_an_embedding_is_as_large():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert kinds(attached(model)[2])["1.weight"] == "matrix"


def test_one_row_is_a_vector_and_plain_parameters_are_matrices():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(4, 8))
    model.experts = nn.Parameter(torch.randn(3, 4, 8))
    assert kinds(attached(model)[2]) == {"a": "vector", "b": "matrix", "experts": "matrix"}


def test_tied_weights_are_one_parameter_and_frozen_ones_are_left_out():
    model = Mixed()
    model.head.weight = model.embedding.weight
    model.mix.weight.requires_grad_(False)
    names = kinds(attached(model)[2])
    assert names["embedding.weight"] == "embedding"
    assert not {"head.weight", "mix.weight"} & names.keys()


def test_it_is_a_torch_optimizer_over_the_real_parameters():
    model, _, opt = attached(Mixed())
    assert isinstance(opt, torch.optim.Optimizer)
    held = {id(parameter) for group in opt.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(opt.state[parameter] for parameter in model.parameters())  # state exists from construction


def test_rates_follow_lr_unless_given():
    def rates(**options):
        return {
            group["kind"]: (group["lr"], group["lr_scale"]) for group in attached(Mixed(), lr=1e-2, **options)[2].param_groups
        }

    assert rates() == {"matrix": (1e-2, 1.0), "embedding": (1e-2, 1 / 8), "vector": (1e-2, 1.0)}
    own = {"vector": {"lr": 0.5}, "table": {"lr": 0.25}}
    assert rates(kinds=own) == {"matrix": (1e-2, 1.0), "embedding": (0.25, 1.0), "vector": (0.5, 1.0)}


def test_the_first_matching_group_wins_and_takes_every_option():
    groups = [
        {"match": ["mix.weight"], "lr": 0.5, "rank": 2, "momentum_rank": 1, "beta": 0.5, "weight_decay": 0.1},
        {"match": "*.weight", "lr": 0.25},
    ]
    groups[0]["rule"] = "factor_moments"
    _, _, opt = attached(Mixed(), groups=groups)
    records = {record.plan.name: record for record in opt.records}
    mix, conv = records["mix.weight"], records["conv.weight"]
    group = opt.param_groups[mix.group_index]
    assert (group["lr"], group["beta"], group["weight_decay"], group["rule"]) == (0.5, 0.5, 0.1, "factor_moments")
    assert (mix.largest_rank, mix.momentum_rank) == (2, 1)
    assert opt.param_groups[conv.group_index]["lr"] == 0.25
    assert opt.param_groups[records["mix.bias"].group_index]["lr"] == pytest.approx(1e-2)


def test_a_groups_own_lr_is_nearer_than_a_global_one_of_a_kind():
    _, _, opt = attached(Mixed(), kinds={"vector": {"lr": 1.0}}, groups=[{"match": "mix.*", "lr": 0.5}])
    records = {record.plan.name: record for record in opt.records}
    assert opt.param_groups[records["mix.bias"].group_index]["lr"] == pytest.approx(0.5)
    assert opt.param_groups[records["conv.bias"].group_index]["lr"] == 1.0


def test_a_group_may_overrule_the_kind():
    _, _, opt = attached(Mixed(), groups=[{"match": "head.*", "kind": "matrix"}])
    assert kinds(opt)["head.weight"] == "matrix"


def test_a_vector_that_becomes_a_matrix_is_seen_as_its_layer_suggests():
    opt = gradlr.attach(nn.Conv2d(6, 1, 3), LossTracker(), groups=[{"match": "weight", "kind": "matrix"}])
    assert next(record.plan.shape for record in opt.records if record.plan.name == "weight") == (1, 54)


def test_rank_takes_an_int_a_fraction_and_a_schedule():
    def largest(rank):
        return attached(mlp(16, 1), rank=rank)[2].records[0].largest_rank

    assert [largest(rank) for rank in (5, 0.5, Fixed(3), gradlr.ByLoss(0.25))] == [5, 8, 3, 4]
    assert attached(mlp(16, 1), momentum_rank=0.25)[2].records[0].momentum_rank == 4


def test_rules_are_names_or_objects():
    rule = LowRankPolar(residual=0)
    _, _, opt = attached(Mixed(), rule=rule, kinds={"vector": {"rule": Adam(beta2=0.9)}, "embedding": {"rule": "adam"}})
    by_kind = {record.plan.kind: record.rule for record in opt.records}
    assert by_kind["matrix"] is rule
    assert by_kind["vector"].beta2 == 0.9
    assert by_kind["embedding"].name == "adam"


def test_repr_shows_what_each_parameter_became():
    _, _, opt = attached(Mixed(), groups=[{"match": "mix.weight", "rank": 2}])
    lines = {line.split()[0]: line for line in repr(opt).splitlines() if line.startswith("  ")}
    assert all(word in lines["embedding.weight"] for word in ("embedding", "rowwise_rmsprop", "44 B"))
    assert all(word in lines["conv.weight"] for word in ("12 x 24", "4/4", "288 B"))  # 2(12 + 24) floats
    assert "2/2" in lines["mix.weight"]
    assert "adam" in lines["norm.bias"]
    assert "of AdamW's" in repr(opt)


BAD_ARGUMENTS = [
    ({"rule": gradlr.rules.LowRankPolar}, "class: pass an object"),
    ({"lr": -1e-3}, "lr"),
    ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"lr": "fast"}, "lr"),
    ({"kinds": {"vector": {"lr": -1.0}}}, r"kinds\['vector'\]\['lr'\]"),
    ({"kinds": {"table": {"lr": -1.0}}}, r"kinds\['embedding'\]\['lr'\]"),
    ({"beta": 1.0}, "beta"),
    ({"beta": -0.1}, "beta"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"weight_decay": math.nan}, "weight_decay"),
    ({"rank": 0}, "rank"),
    ({"rank": 1.5}, "rank"),
    ({"rank": "all"}, "rank"),
    ({"momentum_rank": -1}, "momentum_rank"),
    ({"momentum_rank": True}, "momentum_rank"),
    ({"momentum_rank": gradlr.ByLoss(8)}, "momentum_rank"),
    ({"rule": "sgd"}, "low_rank_polar"),
    ({"rule": LowRankPolar}, "object"),
    ({"kinds": {"vector": {"rule": "low_rank_polar"}}}, "works on matrices"),
    ({"kinds": {"vector": {"rule": "rowwise_rmsprop"}}}, r"'0.bias', a vector.*needs a table"),
    ({"kinds": ["vector"]}, "dict of dicts"),
    ({"kinds": {"bias": {"lr": 1.0}}}, "kind='bias': use one of matrix, embedding, vector"),
    ({"kinds": {"vector": {"weight_decay": 0.1}}}, "'weight_decay'; options of a kind vector are lr, rule"),
    ({"kinds": {"matrix": {"rank": 4}}}, "'rank'; options of a kind matrix are lr, rule, weight_decay"),
    ({"kinds": {"table": {}, "embedding": {}}}, "two words for one kind"),
    ({"rank": lambda inputs: 3}, "RankSchedule"),
    ({"groups": None}, "list of dicts"),
    ({"groups": {"match": "*"}}, "list of dicts"),
    ({"groups": ["0.*"]}, "list of dicts"),
    ({"groups": [{"match": 3}]}, "glob"),
    ({"apply": "later"}, "backward"),
    ({"seed": -1}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"groups": [{"match": "encoder.*", "lr": 1.0}]}, r"encoder.*matches no trainable parameter"),
    ({"groups": [{"match": "*"}, {"match": "0.*"}]}, "earlier group"),
    ({"groups": [{"lr": 1.0}]}, "match"),
    ({"groups": [{"match": []}]}, "glob"),
    ({"groups": [{"match": "*", "learning_rate": 1.0}]}, "learning_rate"),
    ({"groups": [{"match": "*", "lr": -1.0}]}, "lr"),
    ({"groups": [{"match": "*.bias", "weight_decay": 0.1}]}, "'weight_decay' does nothing.*vector"),
    ({"groups": [{"match": "*.weight", "kinds": {"vector": {"rule": "adam"}}}]}, r"kinds\['vector'\] does nothing.*matrix"),
    ({"groups": [{"match": "*.weight", "kind": "tensor"}]}, "kind"),
    ({"groups": [{"match": "*.bias", "kind": "matrix"}]}, "cannot be a matrix"),
]


def bad_name(options):
    return str(options)[:60].split(" at 0x")[0]


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS, ids=[bad_name(options) for options, _ in BAD_ARGUMENTS])
def test_arguments_out_of_range_leave_the_model_unattached(options, message):
    model = mlp()
    with pytest.raises(ArgumentError, match=message):
        gradlr.attach(model, LossTracker(), **options)
    gradlr.attach(model, LossTracker()).detach()  # a left-over hook would make this fail


def test_options_of_rules_are_checked():
    for make in (
        lambda: LowRankPolar(residual=-1),
        lambda: gradlr.rules.FactorMoments(scale=-1.0),
        lambda: Adam(eps=-1e-8),
        lambda: Adam(eps=0),
        lambda: gradlr.rules.RowwiseRMSprop(beta2=2),
    ):
        with pytest.raises(ArgumentError):
            make()


def test_no_module_no_tracker():
    with pytest.raises(ArgumentError, match="Module"):
        gradlr.attach(list(mlp().parameters()), LossTracker())
    with pytest.raises(ArgumentError, match="LossTracker"):
        gradlr.attach(mlp(), 1e-3)


@pytest.mark.parametrize("model", [nn.ReLU(), mlp().requires_grad_(False)])
def test_a_model_without_trainable_parameters(model):
    with pytest.raises(AttachError, match="requires a gradient"):
        gradlr.attach(model, LossTracker())


def test_complex_parameters_are_refused():
    with pytest.raises(AttachError, match="complex"):
        gradlr.attach(nn.Linear(4, 4, dtype=torch.complex64), LossTracker())


def test_a_gradient_left_from_before_is_refused():
    model = mlp()
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(AttachError, match=r"'0\.weight' holds a gradient.*zero_grad"):
        gradlr.attach(model, LossTracker())
    model.zero_grad()
    gradlr.attach(model, LossTracker()).detach()


def test_a_schedule_that_leaves_its_range_is_named():
    class Wild(gradlr.RankSchedule):
        def __call__(self, inputs):
            return 99

        def ceiling(self, limit):
            return min(8, limit)

    model, tracker, opt = attached(rank=Wild())
    with pytest.raises(ArgumentError, match=r"gave rank 99 for '0\.weight'.*\[1, 8\]"):
        tracker(1.0)


def test_attaching_twice_names_the_way_out():
    model, _, opt = attached()
    with pytest.raises(AttachError, match=r"'0.weight' is attached already.*detach"):
        gradlr.attach(model, LossTracker())
    opt.detach()
    gradlr.attach(model, LossTracker()).detach()


def test_data_parallel_wrappers_are_refused(tmp_path):
    with pytest.raises(AttachError, match="DataParallel"):
        gradlr.attach(nn.DataParallel(mlp()), LossTracker())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(AttachError, match="DistributedDataParallel.*drift apart"):
            gradlr.attach(nn.parallel.DistributedDataParallel(mlp()), LossTracker())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators may not:UserWarning")  # torch 2.6, of a mesh on the CPU
def test_sharded_parameters_are_seen_and_several_processes_not_passed_over(tmp_path, monkeypatch):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,))))
        tracker = LossTracker()
        with pytest.raises(gradlr.ArgumentError, match="know their processes"):
            gradlr.attach(model, tracker, process_group=torch.distributed.group.WORLD, apply="step")
        with pytest.raises(gradlr.ArgumentError, match="FSDP2 gathers a weight"):
            gradlr.attach(model, tracker, capture="adaptor")
        opt = gradlr.attach(model, tracker)
        before = model.weight.to_local().clone()
        x = distribute_tensor(torch.ones(2, 4), model.weight.device_mesh)
        tracker(model(x).to_local().square().mean()).backward()
        assert not torch.equal(model.weight.to_local(), before) and model.weight.grad is None
        assert opt.state[model.weight].keys() == {"step"}
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.warns(gradlr.GradlrWarning, match="2 processes"):
            gradlr.attach(mlp(), LossTracker())
    finally:
        torch.distributed.destroy_process_group()


def test_a_launcher_whose_processes_never_meet_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun sets it
    with pytest.warns(gradlr.GradlrWarning, match="4 processes run, and each trains alone: .*process_group="):
        gradlr.attach(mlp(), LossTracker())


class Elsewhere(nn.Parameter):
    """A parameter that says to lie on another device."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.mark.parametrize("apply", ["backward", "step"])
def test_a_model_that_is_spread_over_two_devices_is_refused(apply):
    model = mlp()
    model[2].weight = Elsewhere(model[2].weight.detach())
    with pytest.raises(AttachError, match="lie on cpu and cuda:1; gradlr trains models on one device so far"):
        attached(model, apply=apply)
    model[2].weight.requires_grad_(False)  # what is frozen may lie anywhere
    attached(model, apply=apply)


def test_logarithms_of_rates_are_told_to_be_taken_as_a_matrix():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log, self.weight = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(8, 4))

    with pytest.warns(gradlr.GradlrWarning, match=r"'A_log' \(8, 4\) belongs to no layer.*as a 8 x 4 matrix.*\"vector\""):
        attached(Mixer())
    _, _, opt = attached(Mixer(), groups=[{"match": "A_log", "kind": "vector"}])
    assert kinds(opt) == {"A_log": "vector", "weight": "matrix"}
