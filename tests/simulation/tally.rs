/// How often what the simulation is for has happened.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub crashes: u64,
    pub nodes_lost: u64,
    pub stalls: u64,
    /// Nodes that the others could not reach any more, or again.
    pub cut_off: u64,
    pub appends_refused: u64,
    /// Operations executed again that have an outcome.
    pub replayed: u64,
    /// Rank sets that began from a snapshot.
    pub restored: u64,
    /// Sample requests tried on another replica.
    pub tried_again: u64,
    /// Pieces of the past that the journal forgot, and blobs that went with them.
    pub pruned: u64,
    pub swept: u64,
    /// Publishes that failed for want of a sampler.
    pub unpublished: u64,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        self.crashes += other.crashes;
        self.nodes_lost += other.nodes_lost;
        self.stalls += other.stalls;
        self.cut_off += other.cut_off;
        self.appends_refused += other.appends_refused;
        self.replayed += other.replayed;
        self.restored += other.restored;
        self.tried_again += other.tried_again;
        self.pruned += other.pruned;
        self.swept += other.swept;
        self.unpublished += other.unpublished;
    }
}
