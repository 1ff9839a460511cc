import pytest
import torch

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.merging import task_vector
from steph.merging.steph import STEPH, convert_released, mixture_coefficients
from steph.mil import MeanMIL
from steph.mil import convert_released as convert_network
from steph.mil.state import load_into, state_of
from steph.survival import nll_loss
from tests.helpers.made_pool import encoder, moved, released_pool

WB = ("weight", "bias")
EXACT = {"rtol": 1e-10, "atol": 1e-13}


class Problem:
    """The reference file's models, and STEPH on them with the release's trained parameters."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.null, self.target, self.sources = released_pool(numbers)
        self.trained = convert_released({**numbers.state("hyper"), **numbers.state("head")})

    def model(self, **options):
        options = {"top_k": 3, "dim_hidden": 16, "dropout": 0.0, "beta": 0.05, "gamma": 0.005, **options}
        return STEPH(self.null, self.target, options.pop("sources", self.sources), **options)

    def released(self, **options):
        model = self.model(**options)
        load_into(model, {name: self.trained[name] for name in state_of(model, trainable_only=True)})
        return model


@pytest.fixture
def problem(reference, float64):
    return Problem(reference("e_steph"))


def tag(k):
    return "Knone" if k is None else f"K{k}"


@pytest.mark.parametrize("bag", ["A", "B"])
@pytest.mark.parametrize("k", [1, 3, 5, None])
def test_forward_merging_and_losses_are_the_releases(problem, bag, k):
    numbers, model = problem.numbers, problem.released(top_k=k)
    patches = numbers.tensor(f"X_{bag}")
    w, lam, selected = model.coefficients(patches)
    torch.testing.assert_close(w, numbers.tensor(f"w_{bag}"), **EXACT)
    torch.testing.assert_close(lam, numbers.tensor(f"lambda_{bag}"), **EXACT)
    ties = bag == "B" and k == 3  # only two w are positive: which zeros are kept, and the lambda penalty, are free
    if k and not (bag == "B" and k > 2):
        assert selected.tolist() == numbers[f"sel_idx_{bag}_{tag(k)}"].tolist()
    logits, loss, _ = model.forward_pass([patches])
    model.balance_term = False
    plain_loss = model.forward_pass([patches]).auxiliary_loss.item()
    torch.testing.assert_close(logits[0], numbers.tensor(f"logits_{bag}_{tag(k)}"), **EXACT)
    merged = convert_network(numbers.state(f"merged_{bag}_{tag(k)}"))
    torch.testing.assert_close(model.merged_state(patches), merged, **EXACT)
    if ties:
        expected = 0.05 * numbers["mix_loss_B_K3_if_ties_lowest_index"] + 0.005 * numbers["zloss_B_K3"]
        assert plain_loss == pytest.approx(float(expected), rel=1e-10)
        return
    released, paper = (float(numbers[f"aux_{name}_{bag}_{tag(k)}"]) for name in ("released", "paper_eq7"))
    assert loss.item() == pytest.approx(released, rel=1e-10)
    assert plain_loss == pytest.approx(paper, rel=1e-10)


@pytest.mark.parametrize(("bag", "k"), [("A", 3), ("A", None), ("B", None)])
@pytest.mark.parametrize("kind", ["released", "paper"])
def test_gradients_are_the_releases(problem, bag, k, kind):
    numbers, model = problem.numbers, problem.released(top_k=k, balance_term=kind == "released")
    logits, auxiliary_loss, _ = model.forward_pass([numbers.tensor(f"X_{bag}")])
    bins, event = (torch.tensor([int(numbers[f"{name}_{bag}"])]) for name in ("t_bin", "event"))
    (nll_loss(torch.sigmoid(logits), bins, event) + auxiliary_loss).backward()
    expected = convert_released(numbers.state(f"grad_total_{kind}_{bag}_{tag(k)}"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=1e-8, atol=1e-12)
        else:
            assert parameter.grad is None
    assert not expected


def test_parameter_lambda_is_the_releases(problem):
    numbers, model = problem.numbers, problem.model(mix="parameter", top_k=None)
    trained = {k: v for k, v in problem.trained.items() if "mix_head" not in k}
    load_into(model, {**trained, "ratio_vector": numbers.tensor("param_z")})
    bag = numbers.tensor("X_A")
    torch.testing.assert_close(model.coefficients(bag)[1], numbers.tensor("param_lambda"), **EXACT)
    torch.testing.assert_close(model([bag])[0], numbers.tensor("param_logits_A"), **EXACT)
    bounded = problem.model(mix="parameter", bounded_lambda=True)
    load_into(bounded, {**trained, "ratio_vector": torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])})
    assert bounded.coefficients(bag)[1].tolist() == [1, 1, 1, 0.5, 0.25]


@pytest.mark.parametrize(("name", "value"), [("lam0", 0.0), ("lam1", 1.0), ("lam03", 0.3)])
@pytest.mark.parametrize("k", [3, None])
def test_fixed_lambda_is_the_releases(problem, name, value, k):
    model = problem.released(mix=value, top_k=k)
    logits = model([problem.numbers.tensor("X_A")])[0]
    # The release rounds the ratio to float32 and lambda = 0 to 1e-9.
    torch.testing.assert_close(logits, problem.numbers.tensor(f"fix_{name}_logits_A_{tag(k)}"), rtol=1e-6, atol=1e-7)


def test_target_in_the_pool_is_the_releases(problem):
    numbers = problem.numbers
    model = problem.model(mix=0.0, top_k=None, sources={"t": problem.target, **problem.sources})
    trained = {k: v for k, v in problem.trained.items() if "mix_head" not in k}
    trained["hyper.weight_head.3.weight"] = numbers.tensor("incl_target_prj3_weight")
    trained["hyper.weight_head.3.bias"] = numbers.tensor("incl_target_prj3_bias")
    load_into(model, trained)
    bag = numbers.tensor("X_A")
    torch.testing.assert_close(model.coefficients(bag)[0], numbers.tensor("incl_target_w"), **EXACT)
    torch.testing.assert_close(model([bag])[0], numbers.tensor("incl_target_logits_A"), rtol=1e-6, atol=1e-7)


def test_paper_readings(problem):
    bag = problem.numbers.tensor("X_A")
    keeps = problem.model(fresh_head=False)
    assert not keeps.head.weight.requires_grad and torch.equal(keeps.head.weight, problem.target["head.weight"])
    onto_target = problem.model(base="target")
    c = mixture_coefficients(*onto_target.batch_coefficients([bag]))[0]
    vectors = [task_vector(state, problem.null) for state in (problem.target, *problem.sources.values())]
    expected = moved(encoder(problem.target), vectors, c)
    torch.testing.assert_close(encoder(onto_target.merged_state(bag)), expected, **EXACT)


def test_the_releases_own_options_and_a_sigmoid_for_lambda(problem):
    """Of the same hypernetwork's output: w by softplus or sigmoid, lambda by a sigmoid; all else stays."""
    bag = problem.numbers.tensor("X_A")
    plain = problem.released()
    w_logits, z = (values[0] for values in plain.hyper(RaggedBatch.from_bags([bag])))
    expected = {"softplus": (1 + w_logits.exp()).log(), "sigmoid": 1 / (1 + (-w_logits).exp())}
    for name, w in expected.items():
        model = problem.released(w_activation=name)
        mixtures = model.coefficients(bag)
        torch.testing.assert_close(mixtures.w, w, **EXACT)
        torch.testing.assert_close(mixtures.lam, plain.coefficients(bag).lam, **EXACT)
        assert mixtures.selected.tolist() == w_logits.argsort(descending=True)[:3].tolist()
        assert not torch.allclose(model([bag]), plain([bag]))
    lam = problem.released(lambda_activation="sigmoid").coefficients(bag).lam
    torch.testing.assert_close(lam, 1 / (1 + (-z).exp()), **EXACT)
    assert ((lam > 0.5) == (z > 0)).all()


def test_separate_encoders_part_what_w_and_lambda_read(problem):
    """With one embedding in both, it is STEPH; another embedding for lambda changes lambda alone."""
    bag, plain, model = problem.numbers.tensor("X_A"), problem.released(), problem.model(separate_encoders=True)
    load_into(model, {**problem.trained, **{f"hyper.mix_embed.{k}": problem.trained[f"hyper.embed.{k}"] for k in WB}})
    torch.testing.assert_close(model([bag]), plain([bag]), **EXACT)
    torch.nn.init.normal_(model.hyper.mix_embed.weight)
    changed, before = model.coefficients(bag), plain.coefficients(bag)
    assert torch.equal(changed.w, before.w) and not torch.allclose(changed.lam, before.lam)


def test_means_of_w_and_lambda_are_monitored(problem):
    model = problem.released()
    bags = [problem.numbers.tensor("X_A"), problem.numbers.tensor("X_B"), problem.numbers.tensor("X_A")[:1]]
    assert model.monitored == [f"{number}_s{i}" for number in ("w", "lambda") for i in range(5)]
    each = torch.stack([torch.cat(model.coefficients(bag)[:2]) for bag in bags])
    torch.testing.assert_close(model.forward_pass(bags).monitored, each.mean(0), **EXACT)


def test_lambda_and_w_stay_in_their_ranges(problem):
    w, lam, _ = problem.model().batch_coefficients([20 * torch.randn(7, 24) for _ in range(5)])
    assert (w >= 0).all() and (lam > 0).all() and (lam <= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, "top_k = 6 of a pool of 5"),
        ({"top_k": 0}, "choose 1 to 5"),
        ({"sources": {}}, "the pool is empty"),
        ({"mix": 1.5}, "mix = 1.5"),
        ({"mix": "magic"}, "mix = 'magic'"),
        ({"weight": "magic"}, "weight = 'magic'"),
        ({"w_activation": "tanh"}, "w_activation = 'tanh'.*softplus"),
        ({"lambda_activation": "tanh"}, "lambda_activation = 'tanh'.*sigmoid"),
    ],
)
def test_options_that_cannot_be_are_refused(problem, options, message):
    with pytest.raises(Refused, match=message):
        problem.model(**options)


def test_another_network_needs_naming(problem):
    other = state_of(MeanMIL(24, 16, 8))
    with pytest.raises(Refused, match="not ABMIL's"):
        STEPH(other, other, {"a": other}, top_k=1)
