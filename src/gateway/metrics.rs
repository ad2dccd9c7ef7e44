//! `GET /metrics`: figures of this gateway and of the coordinator, as Prometheus reads them.
//!
//! The gateway counts its own requests. Everything else is asked of the coordinator at each reading, so that any
//! gateway shows the same; while it is away only the gateway's own figures are there, with `lockstep_up 0`.
//!
//! Who may read: on a service without keys whoever reaches it. With keys, a key's bearer sees the runs of that
//! key; requests from this machine without a key, which no proxy has passed on, see all.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, http::header::AUTHORIZATION, web};
use prometheus::{
    CounterVec, Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::protocol::{ClusterStatus, Figures, RunInfo};

use super::{Gateway, body::BUDGET_BYTES, caller::Caller, refusal::Refused};

/// How long the coordinator may take to answer: a scrape gives up after 10 s.
const HOLD: Duration = Duration::from_secs(5);

/// Upper bounds of the histogram, in seconds: a status answers in milliseconds, a poll is held for 30 s.
const SECONDS: [f64; 12] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 31.0, 120.0];

/// Headers that a proxy adds: then the peer's address says nothing of the caller.
const PASSED_ON: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// What the gateway counts of its requests.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(
            Opts::new("lockstep_http_requests_total", "Requests that were answered."),
            &["route", "method", "status"],
        )?;
        let opts = HistogramOpts::new("lockstep_http_request_seconds", "From a request to its answer.");
        let seconds = HistogramVec::new(opts.buckets(SECONDS.to_vec()), &["route"])?;
        let registry = Registry::new();
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        Ok(Self { registry, requests, seconds })
    }

    /// Counts one request.
    pub fn answered(&self, route: &str, method: &str, status: u16, took: Duration) {
        self.requests.with_label_values(&[route, method, &status.to_string()]).inc();
        self.seconds.with_label_values(&[route]).observe(took.as_secs_f64());
    }
}

/// `GET /metrics`
pub(super) async fn metrics(
    gateway: web::Data<Gateway>,
    metrics: web::Data<Metrics>,
    request: HttpRequest,
) -> Result<HttpResponse, Refused> {
    let owner = match request.headers().contains_key(AUTHORIZATION) || !is_local(&request) {
        true => Caller::of(&request)?.name,
        false => None,
    };
    let upstream = gateway.everything.seen_by(owner.clone(), Default::default());
    let held = gateway.bodies.held();
    let mut page = metrics.registry.gather();
    let told = match (upstream.figures(HOLD).await, upstream.cluster(HOLD).await) {
        (Ok(figures), Ok(status)) => Some((figures, status)),
        _ => None,
    };
    let standing = told.map(|(figures, mut status)| {
        status.runs.retain(|run| owner.is_none() || run.owner == owner);
        (figures, status)
    });
    let registry = read(held, standing.as_ref()).map_err(|e| Refused::fault(format!("metrics: {e}")))?;
    page.extend(registry.gather());
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    encoder.encode(&page, &mut text).map_err(|e| Refused::fault(format!("metrics: {e}")))?;
    Ok(HttpResponse::Ok().content_type(encoder.format_type()).body(text))
}

/// Whether a request comes from this machine, straight.
fn is_local(request: &HttpRequest) -> bool {
    let passed_on = PASSED_ON.iter().any(|header| request.headers().contains_key(*header));
    !passed_on && request.peer_addr().is_some_and(|peer| peer.ip().is_loopback())
}

/// Figures that stand as they are read.
struct Reading(Registry);

impl Reading {
    fn gauge(&self, name: &str, help: &str, value: f64) -> Result<(), prometheus::Error> {
        self.gauges(name, help, &[], &[(vec![], value)])
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        values: &[(Vec<&str>, f64)],
    ) -> Result<(), prometheus::Error> {
        let gauges = GaugeVec::new(Opts::new(name, help), labels)?;
        for (of, value) in values {
            gauges.with_label_values(of).set(*value);
        }
        self.0.register(Box::new(gauges))
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        values: &[(Vec<&str>, f64)],
    ) -> Result<(), prometheus::Error> {
        let counters = CounterVec::new(Opts::new(name, help), labels)?;
        for (of, value) in values {
            counters.with_label_values(of).inc_by(*value);
        }
        self.0.register(Box::new(counters))
    }
}

fn read(held: u64, told: Option<&(Figures, ClusterStatus)>) -> Result<Registry, prometheus::Error> {
    let reading = Reading(Registry::new());
    reading.gauge("lockstep_up", "Whether the coordinator answers.", f64::from(u8::from(told.is_some())))?;
    reading.gauge("lockstep_http_body_bytes", "Bytes of request bodies that hold room.", held as f64)?;
    reading.gauge("lockstep_http_body_bytes_limit", "Bytes that there is room for.", BUDGET_BYTES as f64)?;
    if let Some((figures, status)) = told {
        counted(&reading, figures)?;
        standing(&reading, status)?;
    }
    Ok(reading.0)
}

/// What the coordinator has counted since it started.
fn counted(reading: &Reading, figures: &Figures) -> Result<(), prometheus::Error> {
    let ended = |value: fn(&crate::protocol::EndedOperations) -> f64| {
        let labelled = figures
            .operations
            .iter()
            .map(|ended| (vec![ended.operation.as_str(), ended.outcome.as_str()], value(ended)));
        labelled.collect::<Vec<_>>()
    };
    let labels = ["operation", "outcome"];
    let help = "Operations with a durable outcome.";
    reading.counters("lockstep_operations_total", help, &labels, &ended(|ended| ended.count as f64))?;
    let help = "From being accepted to the durable outcome.";
    reading.counters("lockstep_operation_seconds_total", help, &labels, &ended(|ended| ended.seconds))?;
    for (name, help, value) in [
        ("lockstep_trained_tokens_total", "Tokens that optimiser steps were over.", figures.trained_tokens),
        ("lockstep_samples_total", "Sample requests that were answered.", figures.samples),
        ("lockstep_sampled_tokens_total", "Tokens that were sampled.", figures.sampled_tokens),
        ("lockstep_stage_failures_total", "Policies that a node could not stage.", figures.stage_failures),
        ("lockstep_activations_total", "Policies that a node began to serve.", figures.activations),
    ] {
        reading.counters(name, help, &[], &[(vec![], value as f64)])?;
    }
    Ok(())
}

/// How nodes and runs stand.
fn standing(reading: &Reading, status: &ClusterStatus) -> Result<(), prometheus::Error> {
    let nodes = &status.nodes;
    reading.gauge("lockstep_nodes", "Nodes that are there.", nodes.len() as f64)?;
    let slots = |of: fn(&crate::protocol::NodeStatus) -> u32| nodes.iter().map(|n| f64::from(of(n))).sum();
    reading.gauge("lockstep_trainer_slots", "Ranks that they hold.", slots(|node| node.trainers))?;
    reading.gauge("lockstep_sampler_replicas", "Replicas that they run.", slots(|node| node.samplers))?;
    reading.gauge("lockstep_runs", "Runs that are not deleted.", status.runs.len() as f64)?;
    let ids: Vec<String> = status.runs.iter().map(|run| run.run.to_string()).collect();
    let of_runs = |name: &str, help: &str, value: fn(&RunInfo) -> Option<f64>| {
        let values =
            status.runs.iter().zip(&ids).filter_map(|(run, id)| Some((vec![id.as_str()], value(run)?)));
        reading.gauges(name, help, &["run"], &values.collect::<Vec<_>>())
    };
    let help = "Operations that are accepted and not finished.";
    of_runs("lockstep_run_queued_operations", help, |run| Some(f64::from(run.queued)))?;
    of_runs("lockstep_run_step", "Optimiser steps applied.", |run| Some(run.step as f64))?;
    of_runs("lockstep_run_policy_version", "The version that samplers serve.", |run| {
        run.live.or(run.initial).map(|live| live.step as f64)
    })
}
