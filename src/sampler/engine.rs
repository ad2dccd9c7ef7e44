//! Carries out orders: one forward over all rows of a step, then a draw for each sequence, both where the model is.
//!
//! A step's rows are those of prompts (many each) and of sequences (one each), packed; requests
//! of the base model and of several adapters share it. What a row yields depends on its own
//! sequence alone, so the company that a request happens to have never shows in its answer.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    gpu::GpuError,
    kernels::{CoreBudget, Priority, Team},
    model::{
        BaseModel, DrawBuffers, DrawRow, HeadRequest, HiddenStates, NotFinite, Workspace, draw_rows, extend,
        logprobs_of,
    },
};

use super::{
    error::SamplerError,
    job::{Job, Serving},
    schedule::{RequestKey, Step},
    state::{Admission, StepReport},
};

/// An [`Order`](super::state::Order), with the weights that it names.
pub struct EngineOrder {
    pub drop: Vec<RequestKey>,
    pub admit: Vec<(Admission, Serving)>,
    pub step: Step,
}

/// The compute thread's memory.
pub struct Engine {
    cores: CoreBudget,
    jobs: BTreeMap<RequestKey, Job>,
    workspace: Workspace,
    draws: DrawBuffers,
}

/// A request's part of a step.
struct Part {
    key: RequestKey,
    job: Job,
    /// Rows of its prompt.
    rows: usize,
    /// Sequences that decode, ascending.
    sequences: Vec<u32>,
    /// Its first row in the step: the prompt's come first, then one a sequence.
    first_row: usize,
    failure: Option<SamplerError>,
}

impl Engine {
    /// With no requests.
    pub fn new(cores: CoreBudget) -> Self {
        Self { cores, jobs: BTreeMap::new(), workspace: Workspace::default(), draws: DrawBuffers::default() }
    }

    /// Does what the order says; leases cores while there are rows to compute.
    pub fn carry_out(&mut self, order: EngineOrder) -> StepReport {
        let mut report = StepReport::default();
        for key in order.drop {
            self.jobs.remove(&key);
        }
        for (admission, serving) in order.admit {
            let key = admission.key;
            self.jobs.insert(key, Job::new(admission, serving));
        }
        let mut parts = self.take_parts(order.step);
        if let Some(model) = parts.first().map(|part| part.job.serving.model.clone()) {
            let lease = {
                let _span = tracing::debug_span!("wait for cores").entered();
                self.cores.lease(usize::MAX, Priority::Sampling)
            };
            let rows: usize = parts.iter().map(|part| part.rows + part.sequences.len()).sum();
            let _span = tracing::debug_span!("generate", sequences = parts.len(), rows).entered();
            if let Err(error) = self.compute(&model, &mut parts, lease.team(), &mut report) {
                // What the step has appended to the caches is not known: its requests end with it.
                for part in &mut parts {
                    part.failure = Some(SamplerError::Gpu(error.clone()));
                }
            }
        }
        self.settle(parts, &mut report);
        report
    }

    /// The requests that the step names, in the order of their keys.
    fn take_parts(&mut self, step: Step) -> Vec<Part> {
        let mut named: BTreeMap<RequestKey, (usize, Vec<u32>)> = BTreeMap::new();
        for (key, rows) in step.prefill {
            named.entry(key).or_default().0 = rows;
        }
        for (key, sequence) in step.decode {
            named.entry(key).or_default().1.push(sequence);
        }
        let mut next_row = 0;
        let parts = named.into_iter().filter_map(|(key, (rows, sequences))| {
            let job = self.jobs.remove(&key)?;
            let first_row = next_row;
            next_row += rows + sequences.len();
            Some(Part { key, job, rows, sequences, first_row, failure: None })
        });
        parts.collect()
    }

    /// Fails on a GPU only.
    fn compute(
        &mut self,
        model: &Arc<BaseModel>,
        parts: &mut [Part],
        team: &Team,
        report: &mut StepReport,
    ) -> Result<(), GpuError> {
        let mut batch = Vec::new();
        for part in &mut *parts {
            part.job.push_rows(part.rows, &part.sequences, &mut batch);
        }
        let hidden_rd = extend(model, batch, &mut self.workspace, team)?;
        for part in parts.iter_mut().filter(|part| part.rows > 0) {
            self.score_prompt(model, &hidden_rd, part, team)?;
        }
        self.draw(model, &hidden_rd, parts, team, report)
    }

    fn score_prompt(
        &mut self,
        model: &BaseModel,
        hidden_rd: &HiddenStates,
        part: &mut Part,
        team: &Team,
    ) -> Result<(), GpuError> {
        let Part { job, rows, first_row, .. } = part;
        if job.scores_prompt() {
            let targets: Vec<_> = (*first_row..).zip(job.predicted(*rows).iter().copied()).collect();
            let top_k = job.flags.topk_prompt_logprobs as usize;
            let request = HeadRequest { targets: &targets, top_k, entropy: false };
            let scores =
                logprobs_of(model, job.adapter_rows(), hidden_rd, request, &mut self.workspace, team)?;
            part.failure = job.push_scores(&scores.logprobs, scores.alternatives).err();
        }
        job.prompt_computed(*rows);
        Ok(())
    }

    fn draw(
        &mut self,
        model: &BaseModel,
        hidden_rd: &HiddenStates,
        parts: &mut [Part],
        team: &Team,
        report: &mut StepReport,
    ) -> Result<(), GpuError> {
        let rows: Vec<DrawRow<'_>> = parts.iter().flat_map(Part::draws).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let drawn = draw_rows(model, hidden_rd, &rows, &mut self.draws, &mut self.workspace, team)?;
        let mut drawn = drawn.into_iter();
        for part in parts {
            for &sequence in &part.sequences {
                match drawn.next() {
                    Some(Ok(drawn)) => {
                        if part.job.push(sequence, drawn) {
                            report.ended.push((part.key, sequence));
                        }
                    }
                    Some(Err(NotFinite)) => {
                        let position = part.job.draw_key(sequence).position as usize;
                        part.failure = Some(SamplerError::NotFinite { sequence, position });
                    }
                    // One draw was made for each sequence.
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// Answers what is over, keeps the rest.
    fn settle(&mut self, parts: Vec<Part>, report: &mut StepReport) {
        for Part { key, job, failure, .. } in parts {
            match failure {
                Some(error) => report.answers.push((key, Err(error))),
                None if job.is_over() => report.answers.push((key, Ok(job.into_result()))),
                None => {
                    self.jobs.insert(key, job);
                }
            }
        }
    }
}

impl Part {
    /// What is drawn for its sequences, in their order.
    fn draws(&self) -> impl Iterator<Item = DrawRow<'_>> {
        let (adapter, decoding) = (self.job.adapter_rows(), self.job.decoding);
        (self.first_row + self.rows..).zip(&self.sequences).map(move |(row, &sequence)| DrawRow {
            row,
            adapter,
            decoding,
            key: self.job.draw_key(sequence),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::tiny,
        sampler::{budget, schedule::ModelIndex},
    };

    #[test]
    fn a_dropped_request_leaves_nothing_behind_and_the_other_goes_on() {
        let directory = tempfile::tempdir().expect("a directory");
        tiny::write(directory.path(), &tiny::config(), 1).expect("written");
        let model = Arc::new(BaseModel::load("tiny", directory.path()).expect("loads"));
        let mut engine = Engine::new(CoreBudget::new(1));
        let admit = |key| {
            let generate = budget::tests::generate(5, 1, 2);
            let admission = Admission { key: RequestKey(key), model: ModelIndex(0), new_tokens: 2, generate };
            (admission, Serving { model: model.clone(), adapter: None })
        };
        let model = Some(ModelIndex(0));
        let keys = [RequestKey(1), RequestKey(2)];
        let step = Step { model, prefill: keys.map(|key| (key, 4)).to_vec(), decode: vec![] };
        engine.carry_out(EngineOrder { drop: vec![], admit: vec![admit(1), admit(2)], step });
        assert!(engine.jobs.keys().eq(&keys));

        let step = Step { model, prefill: vec![], decode: vec![(RequestKey(2), 0)] };
        let order = EngineOrder { drop: vec![RequestKey(1)], admit: vec![], step: step.clone() };
        let report = engine.carry_out(order);
        assert!(engine.jobs.keys().eq(&keys[1..]));
        assert!(report.answers.is_empty() && report.ended.is_empty());
        let report = engine.carry_out(EngineOrder { drop: vec![], admit: vec![], step });
        assert_eq!(report.ended, [(RequestKey(2), 0)]);
        assert!(matches!(report.answers[..], [(RequestKey(2), Ok(_))]));
        assert!(engine.jobs.is_empty());
    }
}
