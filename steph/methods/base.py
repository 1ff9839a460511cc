"""What a method is: an entry that says what is merged and what is trained, and the inputs that its builder gets.

How training runs, where results go and what is run first is none of a method's business: `steph.training` and
`steph.study` do that alike for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Network, Recipe, Study
from steph.mil import MIL, Model, new_network
from steph.mil.state import ModelState, load_into
from steph.training.device import Compute


class Settings(dict[str, Any]):
    """STEPH's own numbers, those that a method has declared (`Method.settings`); others are refused, so that a run's
    key, which hashes what is declared, misses none."""

    def __missing__(self, name: str) -> Any:
        raise Refused(f"a method uses the setting steph.{name} of the study and does not declare it in `settings`.")


@dataclass(frozen=True)
class Inputs:
    """What a method may build its model from. States are None or empty where the method did not ask for them.

    data, patients: the target's data set and the patients who train in this fold; nobody else may be looked at.
    dim, dimensions: width of the patch features, and the study's dimensions of networks. settings: of STEPH, those that
    the entry declares. stage_state: what the run named by `Method.after` trained. facts: what the builder found out
    when this very run was finished before; empty while it is trained. seed: the run's; study_seed: the study's.
    """

    data: Dataset
    patients: list[str]
    network_name: str
    dim: int
    dimensions: Network
    recipe: Recipe
    settings: Settings
    null_state: ModelState
    target_state: ModelState | None = None
    source_states: Mapping[str, ModelState] = field(default_factory=dict)
    stage_state: ModelState | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    study_seed: int = 42
    compute: Compute = field(default_factory=Compute)

    def network(self, state: ModelState | None = None) -> MIL:
        """A network of the method's kind with the study's dimensions: new, or with a finished model's parameters."""
        network = new_network(self.network_name, self.dim, self.dimensions)
        if state is not None:
            load_into(network, state)
        return network

    @property
    def own_state(self) -> ModelState:
        """The target's own model, for methods that asked for it (`Method.needs_target`)."""
        if self.target_state is None:
            raise Refused(f"the method was given no model of {self.data.name}: set needs_target in its entry.")
        return self.target_state

    @property
    def pool(self) -> dict[str, ModelState]:
        """All models by name, the target's own first, then the sources' in their order."""
        return {self.data.name: self.own_state, **self.source_states}


@dataclass(frozen=True)
class Method:
    """One method. `build` makes its model from inputs; what of it requires a gradient is then trained.

    title: as tables show it. group: its kind: cancer_specific, representation_transfer and model_merging (Table 1's),
    hypernetwork_weights (Table 3's), ablation, sweep, mil_network, control, or one of your own.
    options: given to `build` by name. settings: STEPH's numbers that `build` takes from the study (`Settings`), where
    no option of the same name replaces them. network: its kind, whose M_0 it starts from or merges onto.
    needs_target / needs_sources: cancer-specific models of the target (same fold) / of the other cancers (fold 0) come
    first; `base` is the method that trains them. own_seeds: in place of other cancers' models, K of the target's own
    (same fold) from other seeds. after: a method that comes first on the same data set, fold and seed.
    joint: it is trained once for all data sets. sparse: it keeps only the K sources of largest weight (option top_k, or
    the study's). sweep: the one setting in which it differs from STEPH, and its value in the paper's table.
    looks: how often building it takes a plain network through all training patients, given the number of sources.
    trainings: how many trainings of the model a run takes, those of its builder among them.
    in_book: it belongs to a study's default plan; others run when they are named.
    only: the one source it may use (a name such as "steph@KIPAN", see `method`).
    """

    title: str
    group: str
    build: Callable[..., Model]
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    needs_target: bool = False
    needs_sources: bool = False
    own_seeds: bool = False
    network: str = "abmil"
    base: str = "vanilla"
    after: str | None = None
    joint: bool = False
    sparse: bool = False
    sweep: tuple[str, float] | None = None
    looks: Callable[[int], int] = lambda sources: 0
    trainings: int = 1
    in_book: bool = True
    only: str | None = None

    def settings_of(self, study: Study, n_patients: int | None = None) -> Settings:
        """STEPH's numbers that this method takes from a study, by name: gamma for a data set of so many patients, or,
        where that is None, the numbers of the rule that it follows from."""
        numbers = study.steph.model_dump()
        rule = [numbers[name] for name in ("gamma_large", "gamma_small", "large_above")]
        numbers["gamma"] = rule if n_patients is None else study.steph.gamma(n_patients)
        return Settings({name: numbers[name] for name in self.settings if name not in self.options})

    def sources(self, study: Study, dataset: str) -> dict[str, tuple[str, int]]:
        """The models that are merged beside the target's own: by name, the data set and the seed of each."""
        if self.own_seeds:
            seeds = range(study.seed + 1, study.seed + 1 + study.steph.top_k)
            return {f"{dataset}, seed {seed}": (dataset, seed) for seed in seeds}
        names = [self.only] if self.only else study.sources_of(dataset)
        return {name: (name, study.seed) for name in names} if self.needs_sources else {}

    def refusal(self, study: Study, dataset: str) -> str:
        """Why a study cannot have it, "" where it can: it has too few other cancers."""
        if not self.needs_sources:
            return ""
        sources = study.sources_of(dataset)
        m, pool = len(sources), len(sources) + bool(self.options.get("with_target"))
        if not sources:
            return f"{self.title} needs source cancers; study {study.name} has only {dataset}."
        if self.only is not None and self.only not in sources:
            known = ", ".join(sources)
            return f"{self.title}: {self.only} is no source for {dataset} in study {study.name}; those are {known}."
        has = f"{dataset} has {m} source cancers in study {study.name}"
        if self.sparse and "top_k" not in self.options and study.steph.top_k > pool:
            return f"steph.top_k = {study.steph.top_k}, but {has}; set steph.top_k to at most {m} in the manifest."
        asked = max(self.options.get("sources", 0), self.options.get("top_k", 0) if self.sparse else 0)
        return f"{self.title} asks for {asked} source cancers, but {has}." if asked > pool else ""
