"""Where every artifact lies: the only module that knows paths."""

from dataclasses import dataclass
from pathlib import Path

EXPERIMENTS = "experiments"


def experiments(top: Path) -> dict[str, Path]:
    """Return the experiments of a repository, sorted: name -> directory with params.yaml."""
    found = sorted(top.glob(f"{EXPERIMENTS}/*/params.yaml"))
    return {path.parent.name: path.parent for path in found}


@dataclass(frozen=True)
class Artifacts:
    """The files of one experiment below ``root``; a seed is part of the name from fine_tune on."""

    root: Path

    @property
    def data(self) -> Path:
        """The directory that DVC versions; git ignores it."""
        return self.root / "data"

    @property
    def top(self) -> Path:
        """The repository: what experiments share lies there."""
        return self.root.parents[1] if self.root.parent.name == EXPERIMENTS else self.root

    def code(self) -> Path:
        """The rendered digests of code."""
        return self.root / "code.yaml"

    def memo(self) -> Path:
        """What searches remember; no stage reads it as an input."""
        return self.top / ".taskvec" / "answers.sqlite"

    def retractions(self) -> Path:
        """What must not be used any more, committed to git; the flow reads it, no stage does."""
        return self.top / "retractions.yaml"

    def page(self, name: str) -> Path:
        """A page that a command writes for people; no output of a stage."""
        return self.data / "pages" / f"{name}.html"

    def lineage(self) -> Path:
        """The index of everything recorded; it can be deleted at any time."""
        return self.top / ".taskvec" / "lineage.sqlite"

    def images(self, task: str, split: str) -> Path:
        """Pictures and labels of one split: alignment, train, validation or test."""
        return self.data / "prepared" / task / f"{split}.safetensors"

    def items(self, task: str) -> Path:
        """The table of all items of a task: split, group, label and digest of each."""
        return self.data / "prepared" / task / "items.csv"

    def summary(self, task: str) -> Path:
        """How many items each split holds, and how many duplicates were found."""
        return self.data / "prepared" / task / "summary.json"

    def pretrained(self) -> Path:
        """The vision tower theta_pre that every task starts from."""
        return self.data / "checkpoints" / "pretrained.safetensors"

    def head(self, task: str) -> Path:
        """The frozen classifier of a task."""
        return self.data / "heads" / f"{task}.safetensors"

    def checkpoint(self, task: str, seed: int) -> Path:
        """The fine-tuned vision tower theta_ft."""
        return self.data / "checkpoints" / f"{task}-{seed}.safetensors"

    def training(self, task: str, seed: int) -> Path:
        """The loss of every fine-tuning step."""
        return self.data / "training" / f"{task}-{seed}.csv"

    def vector(self, task: str, seed: int) -> Path:
        """The task vector tau = theta_ft - theta_pre."""
        return self.data / "vectors" / f"{task}-{seed}.safetensors"

    def basis(self, edit: str, seed: int) -> Path:
        """One combined vector a coefficient of an edit, and the coefficient-free part."""
        return self.data / "edits" / f"{edit}-{seed}" / "basis.safetensors"

    def search_table(self, edit: str, seed: int) -> Path:
        """Everything that the coefficient search evaluated."""
        return self.data / "edits" / f"{edit}-{seed}" / "search.csv"

    def coefficients(self, edit: str, seed: int) -> Path:
        """The chosen coefficients and what they reach on validation data."""
        return self.data / "edits" / f"{edit}-{seed}" / "coefficients.json"

    def edited(self, edit: str, seed: int) -> Path:
        """The edited vision tower at the chosen coefficients."""
        return self.data / "edits" / f"{edit}-{seed}" / "model.safetensors"

    def evaluation(self, name: str, seed: int) -> Path:
        """The evaluation table of a task (pre-trained and fine-tuned model) or of an edit."""
        return self.data / "evaluations" / f"{name}-{seed}.csv"

    def metrics(self, name: str, seed: int) -> Path:
        """The same figures as flat JSON, for `dvc metrics show` and MLflow."""
        return self.data / "evaluations" / f"{name}-{seed}.json"

    def figure(self, name: str, seed: int) -> Path:
        """The test accuracies of the same table as a picture."""
        return self.data / "evaluations" / f"{name}-{seed}.svg"

    def sweep_table(self, sweep: str, seed: int) -> Path:
        """Everything that a sweep evaluated on validation data."""
        return self.data / "sweeps" / f"{sweep}-{seed}.csv"

    def sweep_chosen(self, sweep: str, seed: int) -> Path:
        """How the edits of a sweep do at their chosen coefficients."""
        return self.data / "sweeps" / f"{sweep}-{seed}.chosen.csv"

    def few_shot(self, name: str, seed: int) -> Path:
        """Accuracy after fine-tuning on a few labelled images a class."""
        return self.data / "few_shots" / f"{name}-{seed}.csv"

    def similarity(self, seed: int) -> Path:
        """The page that shows how alike the task vectors are; no stage makes it."""
        return self.data / "pages" / f"similarity-{seed}.html"

    def report(self) -> Path:
        """The page that shows the experiment."""
        return self.data / "reports" / "index.html"

    def study_text(self) -> Path:
        """What the study of this experiment shows, committed to git."""
        return self.root / "results.md"

    def study_figures(self) -> Path:
        """The directory of the pictures in `study_text`, committed to git."""
        return self.root / "figures"

    def published(self) -> Path:
        """The published figures that a study sets beside ours; they come with the repository."""
        return self.root / "published.csv"

    def studies(self) -> Path:
        """What all studies show, committed to git."""
        return self.root / "docs" / "results.md"

    def results(self) -> Path:
        """The table of results over all seeds, committed to git."""
        return self.root / "docs" / "results" / "default.md"
