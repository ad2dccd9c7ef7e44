//! A link of threads for ranks and vectors for GPUs, as strict as NCCL is where that matters: work is done in
//! the order in which it was queued and never before it is looked at, a group is taken only after some
//! looks, and whatever a real link would answer with silent damage is a panic here.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use super::link::{Fault, Link, Transfer};
use crate::{collective::plan::Step, protocol::RankIndex};

/// Vectors on their way from one rank to another, first come first served.
type Mail = HashMap<(u32, u32), VecDeque<Vec<f32>>>;

/// What the ranks of one set share.
#[derive(Default)]
pub(super) struct Board {
    arrived: AtomicU32,
    /// By sender and receiver.
    mail: Mutex<Mail>,
}

static BOARDS: LazyLock<Mutex<HashMap<u64, Arc<Board>>>> = LazyLock::new(Mutex::default);

/// An identifier, as `ncclGetUniqueId` makes one.
pub(super) fn unique_id() -> Result<Vec<u8>, Fault> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    BOARDS.lock().unwrap().insert(id, Arc::default());
    Ok(id.to_le_bytes().to_vec())
}

/// How often a group is looked at before it is taken.
const LOOKS: u32 = 3;

pub(super) struct Host {
    board: Arc<Board>,
    me: u32,
    world_size: u32,
    memory: Vec<f32>,
    pinned: Vec<f32>,
    queue: VecDeque<Work>,
    /// Looks until NCCL has taken what was queued last.
    looks: u32,
    aborted: Arc<AtomicBool>,
    /// What goes wrong, if anything.
    pub trouble: Trouble,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Trouble {
    None,
    /// Its groups are never done: a cable is pulled.
    Stuck,
    /// NCCL says so at the next look.
    Refused,
}

enum Work {
    Upload(Range<usize>),
    Download(Range<usize>),
    Group { transfers: Vec<Transfer>, sent: bool },
    Sum { steps: Vec<Step>, sources: Vec<usize>, out: Range<usize> },
    AllReduce { values: Range<usize>, sent: bool },
}

impl Host {
    pub(super) fn start(id: &[u8], me: RankIndex, world_size: u32) -> Result<Self, Fault> {
        let id = u64::from_le_bytes(id.try_into().map_err(|_| Fault::new("start", "no identifier"))?);
        let board = BOARDS.lock().unwrap()[&id].clone();
        board.arrived.fetch_add(1, Ordering::SeqCst);
        Ok(Self {
            board,
            me: me.0,
            world_size,
            memory: Vec::new(),
            pinned: Vec::new(),
            queue: VecDeque::new(),
            looks: LOOKS,
            aborted: Arc::default(),
            trouble: Trouble::None,
        })
    }

    /// Is there as long as the link is.
    pub(super) fn presence(&self) -> Weak<AtomicBool> {
        Arc::downgrade(&self.aborted)
    }

    /// Queues behind what NCCL has taken.
    fn push(&mut self, work: Work) -> Result<(), Fault> {
        assert_eq!(self.looks, 0, "queued behind a group that NCCL has not taken yet");
        if matches!(work, Work::Group { .. } | Work::AllReduce { .. }) {
            self.looks = LOOKS;
        }
        self.queue.push_back(work);
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        if self.aborted.load(Ordering::SeqCst) {
            return Err(Fault::new("ncclCommGetAsyncError", "the communicator was aborted"));
        }
        match self.trouble {
            Trouble::Refused => Err(Fault::new("ncclCommGetAsyncError", "unhandled cuda error")),
            Trouble::None | Trouble::Stuck => Ok(()),
        }
    }

    /// Does what can be done, in order.
    fn advance(&mut self) {
        while let Some(work) = self.queue.pop_front() {
            if let Some(unfinished) = self.perform(work) {
                self.queue.push_front(unfinished);
                return;
            }
        }
    }

    fn perform(&mut self, work: Work) -> Option<Work> {
        match work {
            Work::Upload(into) => {
                let len = into.len();
                self.memory[into].copy_from_slice(&self.pinned[..len]);
            }
            Work::Download(from) => self.pinned[..from.len()].copy_from_slice(&self.memory[from]),
            Work::Group { transfers, sent } => return self.exchange(transfers, sent),
            Work::Sum { steps, sources, out } => self.add(&steps, &sources, out),
            Work::AllReduce { values, sent } => return self.add_over_ranks(values, sent),
        }
        None
    }

    fn exchange(&mut self, transfers: Vec<Transfer>, sent: bool) -> Option<Work> {
        if self.trouble == Trouble::Stuck {
            return Some(Work::Group { transfers, sent });
        }
        let mut mail = self.board.mail.lock().unwrap();
        for transfer in transfers.iter().filter(|_| !sent) {
            if let Transfer::Send { to, values } = transfer {
                let values = self.memory[values.clone()].to_vec();
                mail.entry((self.me, to.0)).or_default().push_back(values);
            }
        }
        let mut wanted: HashMap<u32, usize> = HashMap::new();
        for transfer in &transfers {
            if let Transfer::Receive { from, .. } = transfer {
                *wanted.entry(from.0).or_default() += 1;
            }
        }
        let there = |from: &u32| mail.get(&(*from, self.me)).map_or(0, VecDeque::len);
        if wanted.iter().any(|(from, count)| there(from) < *count) {
            return Some(Work::Group { transfers, sent: true });
        }
        for transfer in transfers {
            if let Transfer::Receive { from, values } = transfer {
                let came = mail.get_mut(&(from.0, self.me)).unwrap().pop_front().unwrap();
                self.memory[values].copy_from_slice(&came);
            }
        }
        None
    }

    /// The machine of `sum.cu`, place by place.
    fn add(&mut self, steps: &[Step], sources: &[usize], out: Range<usize>) {
        for source in sources {
            let overlaps = *source < out.end && out.start < source + out.len();
            assert!(!overlaps, "a sum would be written over what it is made of");
        }
        for i in 0..out.len() {
            let mut stack = Vec::new();
            for step in steps {
                match *step {
                    Step::Load(k) => stack.push(self.memory[sources[k] + i]),
                    Step::AddFrom(k) => *stack.last_mut().unwrap() += self.memory[sources[k] + i],
                    Step::Add => {
                        let right = stack.pop().unwrap();
                        *stack.last_mut().unwrap() += right;
                    }
                }
            }
            self.memory[out.start + i] = stack.pop().unwrap_or(0.0);
        }
    }

    /// From the last rank to the first: an order that no tree has.
    fn add_over_ranks(&mut self, values: Range<usize>, sent: bool) -> Option<Work> {
        let mut mail = self.board.mail.lock().unwrap();
        for to in (0..self.world_size).filter(|_| !sent) {
            mail.entry((self.me, to)).or_default().push_back(self.memory[values.clone()].to_vec());
        }
        let there = |from| mail.get(&(from, self.me)).is_some_and(|queue| !queue.is_empty());
        if !(0..self.world_size).all(there) {
            return Some(Work::AllReduce { values, sent: true });
        }
        let mut sum = vec![0.0; values.len()];
        for from in (0..self.world_size).rev() {
            let came = mail.get_mut(&(from, self.me)).unwrap().pop_front().unwrap();
            sum.iter_mut().zip(came).for_each(|(sum, value)| *sum += value);
        }
        self.memory[values].copy_from_slice(&sum);
        None
    }
}

impl Link for Host {
    fn reserve(&mut self, device: usize, pinned: usize) -> Result<(), Fault> {
        assert!(self.queue.is_empty(), "memory that is in use");
        self.memory = vec![f32::NAN; device];
        self.pinned = vec![f32::NAN; pinned];
        Ok(())
    }

    fn pinned(&mut self) -> Result<&mut [f32], Fault> {
        assert!(self.queue.is_empty(), "pinned memory that a copy may be reading");
        Ok(&mut self.pinned)
    }

    fn upload(&mut self, into: Range<usize>) -> Result<(), Fault> {
        self.push(Work::Upload(into))
    }

    fn download(&mut self, from: Range<usize>) -> Result<(), Fault> {
        self.push(Work::Download(from))
    }

    fn transfer(&mut self, transfers: &[Transfer]) -> Result<(), Fault> {
        self.push(Work::Group { transfers: transfers.to_vec(), sent: false })
    }

    fn sum(&mut self, steps: &[Step], sources: &[usize], out: Range<usize>) -> Result<(), Fault> {
        self.push(Work::Sum { steps: steps.to_vec(), sources: sources.to_vec(), out })
    }

    fn all_reduce(&mut self, values: Range<usize>) -> Result<(), Fault> {
        self.push(Work::AllReduce { values, sent: false })
    }

    fn is_queued(&mut self) -> Result<bool, Fault> {
        self.check()?;
        if self.board.arrived.load(Ordering::SeqCst) < self.world_size {
            return Ok(false);
        }
        self.looks = self.looks.saturating_sub(1);
        Ok(self.looks == 0)
    }

    fn is_idle(&mut self) -> Result<bool, Fault> {
        if !self.is_queued()? {
            return Ok(false);
        }
        self.advance();
        Ok(self.queue.is_empty())
    }

    fn abort(&mut self) {
        self.aborted.store(true, Ordering::SeqCst);
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let aborted = self.aborted.clone();
        Box::new(move || aborted.store(true, Ordering::SeqCst))
    }
}
