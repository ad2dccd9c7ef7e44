//! The task: answer a sum, and stop.
//!
//! An instruction-tuned small model rambles when asked "What is 7 + 6?". The reward asks for
//! no format: the reply must end by itself and its last number must be the sum. Operands of 0
//! are left out, since echoing the other operand would be right by chance.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// An ordered question `a + b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    pub a: u32,
    pub b: u32,
}

/// Unordered pairs that are never trained on; half of their sums reach 10.
const HELD_OUT: [(u32, u32); 10] =
    [(2, 4), (2, 5), (2, 6), (3, 3), (3, 7), (3, 9), (4, 5), (4, 7), (5, 5), (7, 8)];

impl Pair {
    /// The right answer.
    pub fn sum(self) -> u32 {
        self.a + self.b
    }

    fn is_held_out(self) -> bool {
        HELD_OUT.contains(&(self.a.min(self.b), self.a.max(self.b)))
    }
}

fn all_pairs() -> impl Iterator<Item = Pair> {
    (1..=9).flat_map(|a| (1..=9).map(move |b| Pair { a, b }))
}

/// The 18 ordered pairs that only measure.
pub fn held_out() -> Vec<Pair> {
    all_pairs().filter(|pair| pair.is_held_out()).collect()
}

/// The 63 ordered pairs that are trained on.
pub fn training_pairs() -> Vec<Pair> {
    all_pairs().filter(|pair| !pair.is_held_out()).collect()
}

/// The prompt, in ChatML without a system message: the model's own template would put its
/// default one in front, which doubles the prompt and teaches nothing.
pub fn prompt(pair: Pair) -> String {
    format!("<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n", pair.a, pair.b)
}

/// 1 if the reply ended by itself and the last run of digits in it is the sum, else 0.
pub fn reward(pair: Pair, reply: &str, ended: bool) -> f64 {
    let last_number = reply.split(|c: char| !c.is_ascii_digit()).rfind(|digits| !digits.is_empty());
    let right = last_number.is_some_and(|digits| digits.parse() == Ok(pair.sum()));
    f64::from(u8::from(ended && right))
}

/// Deals the training pairs without repetition, shuffled anew when they are used up.
pub struct Dealer {
    random: ChaCha8Rng,
    deck: Vec<Pair>,
}

impl Dealer {
    /// The order of the deck follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), deck: Vec::new() }
    }

    /// The next `count` pairs.
    pub fn deal(&mut self, count: usize) -> Vec<Pair> {
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> Pair {
        if self.deck.is_empty() {
            self.deck = training_pairs();
            // Fisher–Yates; the modulo's bias over 63 cards is below 2^-57.
            for last in (1..self.deck.len()).rev() {
                let other = (self.random.next_u64() % (last as u64 + 1)) as usize;
                self.deck.swap(last, other);
            }
        }
        self.deck.pop().expect("a fresh deck holds 63 pairs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_pairs_are_18_in_both_orders_and_never_trained() {
        let held_out = held_out();
        assert_eq!((held_out.len(), training_pairs().len()), (18, 63));
        assert_eq!(held_out.iter().filter(|p| p.sum() >= 10).count(), 9);
        assert!(held_out.iter().all(|p| held_out.contains(&Pair { a: p.b, b: p.a })));
        assert!(training_pairs().iter().all(|p| !held_out.contains(p)));
    }

    #[test]
    fn only_a_finished_reply_with_the_right_last_number_is_rewarded() {
        let pair = Pair { a: 7, b: 6 };
        for (reply, ended, expected) in [
            ("7 + 6 = 13.", true, 1.0),
            ("The answer is 13", true, 1.0),
            ("7 + 6 = 13.", false, 0.0),
            ("13 is 7 + 6", true, 0.0),
            ("7 + 6 = 130", true, 0.0),
            ("thirteen", true, 0.0),
            ("", true, 0.0),
            ("99999999999999999999", true, 0.0),
        ] {
            assert_eq!(reward(pair, reply, ended), expected, "{reply:?}");
        }
    }

    #[test]
    fn the_deck_is_dealt_without_repetition_and_by_seed() {
        let mut deck = Dealer::new(3).deal(63);
        assert_eq!(deck, Dealer::new(3).deal(63));
        assert_ne!(deck, Dealer::new(4).deal(63));
        deck.sort_by_key(|p| (p.a, p.b));
        deck.dedup();
        assert_eq!(deck.len(), 63);
    }
}
