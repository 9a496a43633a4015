"""What a run did, in a few English sentences: the first paragraph of its report."""

import math

from lmjax.monitoring.units import human_count, human_seconds
from lmjax.reporting.run_files import RunRecord, last
from lmjax.reporting.task_report import measures, title


def summarise(run: RunRecord) -> str:
    """The model, how long it trained on what, the loss that it reached, and the time that took."""
    model, facts = run.config.get("model", {}), run.facts
    size = f"{human_count(facts['parameters'])}-parameter " if "parameters" in facts else ""
    shape = [f"{model[key]} {word}" for key, word in (("num_layers", "layers"),
                                                      ("embed_dim", "wide")) if key in model]
    task = run.config.get("task", {}).get("name")
    kind = f"model for {task}" if task else "language model"
    subject = f"A {size}{kind}" + (f" ({', '.join(shape)})" if shape else "")
    epochs, sources = last(run.train, "epoch"), source_names(run)
    seen = f"{human_count(float(run.tokens(run.step)))} {run.unit}s"
    seen += f" ({epochs:.2f} epochs)" if epochs > 0 else ""
    seen += f" of {_join(sources)}" if sources else ""
    done = (f"{run.step:,} of {facts['steps']:,} steps so far" if run.unfinished
            else f"{run.step:,} steps")
    return (f"{subject} trained for {done} on {seen}. {_reached(run)}{_best(run)}{_compared(run)}"
            f"{_took(run)}")


def device_name(run: RunRecord) -> str:
    """`8 CPU devices (AMD EPYC)`; "" if the run did not record its devices."""
    device = run.facts.get("device", {})
    if not device:
        return ""
    platform, kind = device.get("platform", "?"), device.get("kind", "")
    count = device.get("count", 1)
    name = f"{count} {platform.upper()} device{'s' if count != 1 else ''}"
    return f"{name} ({kind})" if kind and kind.lower() != platform.lower() else name


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def source_names(run: RunRecord) -> list[str]:
    """Where the texts came from, as the config names it."""
    sources = run.config.get("data", {}).get("sources", [])
    names = [source.get("uri") or source.get("name") for source in sources
             if isinstance(source, dict)]
    return [str(name) for name in names if name]


def _reached(run: RunRecord) -> str:
    """The newest loss: on held-out text if it was measured, else of training."""
    loss, bits = last(run.heldout, "loss"), last(run.heldout, "bits_per_byte")
    if task_figures := [f"{title(name)} {last(run.heldout, name):.3f}" for name in measures(run)]:
        return f"On held-out examples it reaches {_join(task_figures[:3])}. "
    if math.isnan(loss):
        loss = last(run.train, "loss")
        return "" if math.isnan(loss) else f"Its training loss is {loss:.3f} nats per {run.unit}. "
    each = f"{bits:.3f} bits per byte{run.of}, " if math.isfinite(bits) else ""
    return f"On held-out text it reaches {each}a loss of {loss:.3f} nats per {run.unit}. "


def _best(run: RunRecord) -> str:
    """The best step by the run's metric, and whether the run ended because of it."""
    metric, step = run.config.get("eval", {}).get("metric"), run.best_step
    if not (metric and step):
        return ""
    columns = next(columns for columns in run.evals.values() if "best_step" in columns)
    value = columns[metric][columns["step"] == step]  # of a long file not every line is read
    best = f"Its best step by {metric} is {step:,}" + (f" ({value[-1]:.3f})" if len(value) else "")
    if not run.ended_early:
        return f"{best}. "
    return (f"{best}; it ended early, at step {run.step:,} of {run.facts.get('steps', 0):,}, "
            f"because {run.ended_early['waited']} evaluations found nothing better. ")


def _compared(run: RunRecord) -> str:
    """Compares the newest held-out loss to n-gram baselines, which predict the same tokens."""
    loss, objective = last(run.heldout, "loss"), run.config.get("data", {}).get("objective", {})
    if objective.get("name", "causal_lm") != "causal_lm":
        return ""  # the model predicts other tokens, or sees both sides of them
    known = [(b["name"], b["loss"]) for b in run.baselines
             if math.isfinite(b.get("loss", math.nan))]
    if math.isnan(loss) or not known:
        return ""
    beaten = [(name, value) for name, value in known if loss < value]
    ahead = [f"{name} ({value:.2f})" for name, value in known if loss >= value]
    if not beaten:
        return f"That is not yet below a baseline of the same data: {_join(ahead)}. "
    name, best = min(beaten, key=lambda item: item[1])
    text = f"That is {1 - loss / best:.0%} less than the {name} baseline's {best:.2f}"
    rest = [f"{name} ({value:.2f})" for name, value in beaten if value != best]
    text += f", and below {_join(rest)} as well" if rest else ""
    return text + (f", but not yet below {_join(ahead)}. " if ahead else ". ")


def _took(run: RunRecord) -> str:
    device = device_name(run)
    if not run.seconds > 0:
        return f"It ran on {device}." if device else ""
    resumed = sum(event["event"] == "resume" for event in run.events)
    times = f", resumed {'once' if resumed == 1 else f'{resumed} times'}" if resumed else ""
    where = f" on {device}" if device else ""
    return f"It took {human_seconds(run.seconds)}{where}{times}."
