use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::{
    Collective, CollectiveError, Partial,
    contribution::{Call, Method},
    exchange::check_lengths,
    plan::{Read, ReducePlan},
};
use crate::protocol::{OpToken, RankIndex};

/// The collective of a rank that is alone.
#[derive(Default)]
pub(super) struct Solo {
    aborted: Arc<AtomicBool>,
}

impl Solo {
    fn check(&self, call: &Call) -> Result<(), CollectiveError> {
        // Relaxed: the flag stands for nothing but itself.
        if self.aborted.load(Ordering::Relaxed) { Err(call.aborted()) } else { Ok(()) }
    }
}

impl Collective for Solo {
    fn rank(&self) -> RankIndex {
        RankIndex(0)
    }

    fn world_size(&self) -> u32 {
        1
    }

    fn all_reduce(
        &mut self,
        token: OpToken,
        leaves: u32,
        partials: Vec<Partial>,
        out: &mut [f32],
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        let call = Call { method: Method::AllReduce, token, deadline };
        self.check(&call)?;
        check_lengths(&call, self.rank(), &partials, out.len())?;
        let nodes: Vec<(u32, u32)> = partials.iter().map(|p| (p.level, p.index)).collect();
        let mut plan = ReducePlan::new(leaves, &nodes).map_err(|e| call.no_tree(e))?;
        let Ok(()) = plan.run(|i, block, _| Ok::<_, Infallible>(Read::Here(&partials[i].values[block])), out);
        Ok(())
    }

    fn all_gather(
        &mut self,
        token: OpToken,
        bytes: Vec<u8>,
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.check(&Call { method: Method::AllGather, token, deadline })?;
        Ok(vec![bytes])
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let aborted = self.aborted.clone();
        Box::new(move || aborted.store(true, Ordering::Relaxed))
    }
}
