"""What Prometheus reads: vLLM's names where it has one, so that its dashboards work, and cost and energy beside."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from jaxcost.cost.hardware import Hardware
from jaxcost.serving.canary import Watch
from jaxcost.serving.scheduler import Scheduler, Ticket
from jaxcost.serving.worker import Job, Reason, Worker

_SECONDS = (0.001, 0.005, *(0.01 * 2**i for i in range(15)))
_TOKENS = tuple(2.0**i for i in range(0, 18))


class Metrics:
    """Counts what happens to requests."""

    def __init__(self, name: str, hardware: Hardware | None = None):
        """`name` is the model's; without hardware nothing is said of money and energy."""
        self.registry, self.hardware = CollectorRegistry(), hardware
        ProcessCollector(registry=self.registry)  # memory and processor time
        self._label = {"model_name": name}
        self._success = self._make(Counter, "vllm:request_success", "Requests that ended.", "finished_reason")
        self._prompt = self._make(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._generation = self._make(Counter, "vllm:generation_tokens", "Tokens made.")
        seconds = {
            "first": ("vllm:time_to_first_token_seconds", "From arrival to the first token."),
            "token": ("vllm:request_time_per_output_token_seconds", "A token after the first, mean of a request."),
            "between": ("vllm:inter_token_latency_seconds", "Between two tokens after the first."),
            "whole": ("vllm:e2e_request_latency_seconds", "From arrival to the last token."),
            "queued": ("vllm:request_queue_time_seconds", "From arrival to a slot."),
        }
        self._seconds = {key: self._make(Histogram, *of, buckets=_SECONDS) for key, of in seconds.items()}
        self._prompt_sizes = self._make(Histogram, "vllm:request_prompt_tokens", "Of a request.", buckets=_TOKENS)
        self._sizes = self._make(Histogram, "vllm:request_generation_tokens", "Of a request.", buckets=_TOKENS)
        self._device = self._make(Counter, "jaxcost:request_device_seconds", "Time of the device.")
        self._usd = self._make(Counter, "jaxcost:request_cost_usd", "Price of that time.")
        self._kwh = self._make(Counter, "jaxcost:request_energy_kwh", "Energy of that time.")
        self._draft_tokens = 0
        self._errors = self._make(Counter, "jaxcost:http_errors", "Requests that were refused or failed.", "status")

    def _make(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        made = kind(name, text, ["model_name", *labels], registry=self.registry, **options)
        return made if labels else made.labels(**self._label)

    def watch(self, worker: Worker) -> None:
        """Shows what a worker has at the time of reading."""
        gauges = {
            "vllm:num_requests_running": ("Requests in slots, or texts in a batch.", lambda: worker.num_running),
            "vllm:num_requests_waiting": ("Requests in the queue.", lambda: worker.num_waiting),
        }
        if isinstance(worker, Scheduler):
            gauges["vllm:kv_cache_usage_perc"] = ("Share of the slots' room in use.", lambda: worker.cache_use)
        if isinstance(worker, Scheduler) and (prefixes := worker.prefixes) is not None:
            gauges["vllm:prefix_cache_queries"] = ("Tokens looked up.", lambda: prefixes.queried_tokens)
            gauges["vllm:prefix_cache_hits"] = ("Tokens found.", lambda: prefixes.hit_tokens)
        for name, (text, value) in gauges.items():
            self._make(Gauge, name, text).set_function(value)
        if isinstance(worker, Scheduler) and (draft := worker.slots.draft) is not None:
            self._draft_tokens = draft.tokens
            counters = {
                "drafts": ("vllm:spec_decode_num_drafts", "Rounds of the draft."),
                "proposed": ("vllm:spec_decode_num_draft_tokens", "Tokens that it proposed."),
                "kept": ("vllm:spec_decode_num_accepted_tokens", "Those that the model kept."),
                "places": ("vllm:spec_decode_num_accepted_tokens_per_pos", "By their place in a round.", "position"),
            }
            self._drafted = {key: self._make(Counter, *of) for key, of in counters.items()}

    def watch_canary(self, canary: Watch) -> None:
        """Shows what a canary says at the time of reading; its score is no number before the first round."""
        score = lambda: float("nan") if canary.nats_per_token is None else canary.nats_per_token  # noqa: E731
        gauges = {
            "jaxcost:canary_nats_per_token": ("Score of the canary.", score),
            "jaxcost:canary_reference_nats_per_token": ("When it was chosen.", lambda: canary.canary.nats_per_token),
            "jaxcost:canary_drifted": ("Whether they differ.", lambda: canary.drifted),
            "jaxcost:canary_rounds": ("Times that it was scored.", lambda: canary.rounds),
        }
        for name, (text, value) in gauges.items():
            self._make(Gauge, name, text).set_function(value)

    def usd(self, device_seconds: float) -> float | None:
        """Price of so much of the device's time, None where it is unknown."""
        return None if self.hardware is None else self.hardware.usd(device_seconds)

    def kwh(self, device_seconds: float) -> float | None:
        """Energy of so much of the device's time, None where it is unknown."""
        return None if self.hardware is None else self.hardware.kwh(device_seconds)

    def spent(self, device_seconds: float) -> dict[str, float | None]:
        """What is said of it in `usage`."""
        of = {"cost_usd": self.usd(device_seconds), "energy_kwh": self.kwh(device_seconds)}
        return {"device_seconds": device_seconds, **of}

    def ended(self, ticket: Job, reason: Reason) -> None:
        """Counts a sequence, or a text, that has ended."""
        times = ticket.times
        self._success.labels(finished_reason=reason, **self._label).inc()
        self._prompt.inc(ticket.prompt_tokens)
        self._generation.inc(ticket.new_tokens)
        self._prompt_sizes.observe(ticket.prompt_tokens)
        self._sizes.observe(ticket.new_tokens)
        self._seconds["whole"].observe(times.ended - times.arrived)
        if times.started is not None:
            self._seconds["queued"].observe(times.started - times.arrived)
        if times.first_token is not None:
            self._seconds["first"].observe(times.first_token - times.arrived)
            if ticket.new_tokens > 1:
                each = (times.ended - times.first_token) / (ticket.new_tokens - 1)
                self._seconds["token"].observe(each)
                self._seconds["between"].observe(each)
        self._device.inc(ticket.device_seconds)
        self._usd.inc(self.usd(ticket.device_seconds) or 0)
        self._kwh.inc(self.kwh(ticket.device_seconds) or 0)
        if self._draft_tokens:
            self._count_drafts(ticket)

    def _count_drafts(self, ticket: Ticket) -> None:
        self._drafted["drafts"].inc(len(ticket.kept))
        self._drafted["proposed"].inc(len(ticket.kept) * self._draft_tokens)
        self._drafted["kept"].inc(sum(ticket.kept))
        for place in range(self._draft_tokens):
            of_place = self._drafted["places"].labels(position=str(place), **self._label)
            of_place.inc(sum(kept > place for kept in ticket.kept))

    def failed(self, status: int) -> None:
        """Counts an answer that says no."""
        self._errors.labels(status=str(status), **self._label).inc()
