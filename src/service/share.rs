/// One node's part of a local cluster.
pub struct Share {
    pub trainers: u32,
    pub samplers: u32,
    /// Cores to compute on.
    pub threads: usize,
}

impl Share {
    /// What node `index` of `nodes` gets: ranks, replicas and cores are dealt out one by one,
    /// and a node has at least one core.
    pub fn of(index: u32, nodes: u32, trainers: u32, samplers: u32, threads: usize) -> Self {
        let (index, nodes) = (index as usize, nodes.max(1) as usize);
        let deal = |total: usize| total / nodes + usize::from(index < total % nodes);
        Self {
            trainers: deal(trainers as usize) as u32,
            samplers: deal(samplers as usize) as u32,
            threads: deal(threads).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_dealt_out_and_no_node_is_without_a_core() {
        let shares: Vec<_> = (0..3).map(|index| Share::of(index, 3, 4, 1, 2)).collect();
        assert_eq!(shares.iter().map(|s| s.trainers).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(shares.iter().map(|s| s.samplers).collect::<Vec<_>>(), [1, 0, 0]);
        assert_eq!(shares.iter().map(|s| s.threads).collect::<Vec<_>>(), [1, 1, 1]);
    }
}
