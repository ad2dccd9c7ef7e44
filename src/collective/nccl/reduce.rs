use std::time::{Duration, Instant};

use super::{
    Reduction,
    layout::Layout,
    link::{Ended, Fault, Link, wait},
    memory,
};
use crate::{
    collective::{
        CollectiveError, Partial,
        contribution::{Call, Header, Method},
        exchange::Exchange,
        plan::{ReducePlan, Step},
    },
    protocol::RankIndex,
};

/// One rank's side.
pub(super) struct Nccl<C, L> {
    control: C,
    link: L,
    reduction: Reduction,
}

/// Values of a piece. Tests have many.
const PIECE: usize = if cfg!(test) { 1 << 12 } else { memory::PIECE as usize };

/// Values of the pinned memory, through which vectors get to the device and back.
const PINNED: usize = if cfg!(test) { 1 << 13 } else { 4 << 20 };

/// How long the other ranks may take, after this one's deadline, to say that they are still there: theirs is
/// at about the same time.
const BLAME_GRACE: Duration = Duration::from_secs(3);

impl<C: Exchange, L: Link> Nccl<C, L> {
    /// Over a link whose communicator is there.
    pub(super) fn new(control: C, link: L, reduction: Reduction) -> Self {
        Self { control, link, reduction }
    }

    #[cfg(test)]
    pub(super) fn link(&mut self) -> &mut L {
        &mut self.link
    }

    /// Sleeps until the link is so far.
    fn wait(&mut self, call: &Call, so_far: impl Fn(&mut L) -> Result<bool, Fault>) -> Result<(), Ended> {
        let Self { control, link, .. } = self;
        wait(link, so_far, || control.is_aborted(), call.deadline)
    }

    /// Everything that the GPU does for one call.
    fn run(
        &mut self,
        call: &Call,
        nodes: &[Vec<(u32, u32)>],
        steps: &[Step],
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), Ended> {
        let counts = nodes.iter().map(Vec::len).collect();
        let layout = Layout::new(self.control.rank(), out.len(), counts, PIECE);
        self.link.reserve(layout.size(), PINNED.min(out.len()))?;
        let mine = partials.len();
        for (k, partial) in partials.into_iter().enumerate() {
            self.upload(call, &partial.values, layout.vector(k).start)?;
        }
        match self.reduction {
            Reduction::Tree => self.add_in_tree_order(call, &layout, steps)?,
            Reduction::Fast => {
                let sources: Vec<usize> = (0..mine).map(|k| layout.vector(k).start).collect();
                let add = |k| if k == 0 { Step::Load(k) } else { Step::AddFrom(k) };
                let steps: Vec<Step> = (0..mine).map(add).collect();
                self.link.sum(&steps, &sources, layout.sum())?;
                self.link.all_reduce(layout.sum())?;
                self.wait(call, L::is_queued)?;
            }
        }
        self.download(call, layout.sum().start, out)
    }

    fn add_in_tree_order(&mut self, call: &Call, layout: &Layout, steps: &[Step]) -> Result<(), Ended> {
        for round in 0..layout.rounds() {
            self.link.transfer(&layout.contributions(round))?;
            self.wait(call, L::is_queued)?;
            if !layout.piece(round).is_empty() {
                self.link.sum(steps, &layout.sources(round), layout.piece(round))?;
            }
        }
        self.link.transfer(&layout.shares())?;
        self.wait(call, L::is_queued)
    }

    /// Through the pinned memory, a piece at a time.
    fn upload(&mut self, call: &Call, values: &[f32], at: usize) -> Result<(), Ended> {
        for (i, piece) in values.chunks(PINNED).enumerate() {
            self.link.pinned()?[..piece.len()].copy_from_slice(piece);
            let start = at + i * PINNED;
            self.link.upload(start..start + piece.len())?;
            self.wait(call, L::is_idle)?;
        }
        Ok(())
    }

    fn download(&mut self, call: &Call, at: usize, out: &mut [f32]) -> Result<(), Ended> {
        for (i, piece) in out.chunks_mut(PINNED).enumerate() {
            let start = at + i * PINNED;
            self.link.download(start..start + piece.len())?;
            self.wait(call, L::is_idle)?;
            piece.copy_from_slice(&self.link.pinned()?[..piece.len()]);
        }
        // Without values there was nothing to wait for above.
        self.wait(call, L::is_idle)
    }

    /// Aborts, and finds out because of whom: NCCL does not say, so the others are asked.
    fn give_up(&mut self, call: &Call, ended: Ended) -> CollectiveError {
        self.link.abort();
        let asked = match &ended {
            Ended::Aborted => return call.aborted(),
            Ended::Deadline | Ended::Fault(_) => self.ask_others(call),
        };
        match (ended, asked) {
            // Its process has ended, or it has left.
            (_, Some(gone @ CollectiveError::Lost { .. })) => gone,
            (Ended::Deadline, Some(CollectiveError::Deadline { missing, .. })) => call.timed_out(missing),
            (Ended::Deadline | Ended::Aborted, _) => {
                call.system("NCCL did not get on by the deadline, though every rank is there")
            }
            // Others that know of nothing yet may wait for theirs; that is no fault of theirs.
            (Ended::Fault(fault), _) => call.system(fault),
        }
    }

    fn ask_others(&mut self, call: &Call) -> Option<CollectiveError> {
        let asked =
            Call { method: Method::AllGather, token: call.token, deadline: Instant::now() + BLAME_GRACE };
        let question = Header {
            method: asked.method,
            // Of no other call.
            round: u64::MAX,
            token: call.token,
            leaves: 0,
            len: 0,
            nodes: Vec::new(),
        };
        self.control.gather(&asked, &question, Vec::new()).err()
    }
}

impl<C: Exchange, L: Link> Exchange for Nccl<C, L> {
    fn rank(&self) -> RankIndex {
        self.control.rank()
    }

    fn world_size(&self) -> u32 {
        self.control.world_size()
    }

    fn is_aborted(&self) -> bool {
        self.control.is_aborted()
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let (control, link) = (self.control.abort_handle(), self.link.abort_handle());
        Box::new(move || {
            control();
            link();
        })
    }

    fn meet(&mut self, call: &Call, header: &Header) -> Result<Vec<Vec<(u32, u32)>>, CollectiveError> {
        self.control.meet(call, header)
    }

    fn reduce(
        &mut self,
        call: &Call,
        header: &Header,
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let nodes = self.control.meet(call, header)?;
        let plan = ReducePlan::new(header.leaves, &nodes.concat()).map_err(|e| call.no_tree(e))?;
        self.run(call, &nodes, &plan.steps, partials, out).map_err(|ended| self.give_up(call, ended))
    }

    fn gather(
        &mut self,
        call: &Call,
        header: &Header,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.control.gather(call, header, bytes)
    }

    fn break_off(&mut self, missing: Option<RankIndex>) {
        self.link.abort();
        self.control.break_off(missing);
    }
}
