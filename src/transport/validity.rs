//! From when until when a certificate is good: what the CA writes, and what is read back from a certificate.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;

use super::TransportError;

/// How long a certificate is good if nobody says otherwise.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(90 * 86_400);

/// Longer than any that is given out now: what builds before this one made is good to 2120, and is renewed.
const LIFE_MAX: u64 = 20 * 366 * 86_400;

/// How far the clocks of a cluster's machines may be apart: a certificate is good from that long before it
/// was issued.
pub(super) const CLOCKS_APART: u64 = 3_600;

/// Seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub issued_at: u64,
    pub expires_at: u64,
}

impl Validity {
    /// For one that is issued at `issued_at`, in whole seconds.
    pub fn lasting(issued_at: u64, life: Duration) -> Self {
        Self { issued_at, expires_at: issued_at.saturating_add(life.as_secs().max(1)) }
    }

    /// Whether two thirds of it are over, so that a new one is due.
    pub fn is_due(&self, now: u64) -> bool {
        let life = self.expires_at.saturating_sub(self.issued_at);
        life > LIFE_MAX || now >= self.issued_at.saturating_add(life / 3 * 2)
    }

    pub fn is_over(&self, now: u64) -> bool {
        now >= self.expires_at
    }

    pub(super) fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, TransportError> {
        let read = || -> Option<(u64, u64)> {
            // RFC 5280, 4.1: Certificate ⊃ TBSCertificate ⊃ [0] version, serial, algorithm, issuer, validity.
            let (_, signed, _) = element(certificate)?;
            let (_, mut fields, _) = element(signed)?;
            if fields.first() == Some(&0xa0) {
                fields = element(fields)?.2;
            }
            for _ in 0..3 {
                fields = element(fields)?.2;
            }
            let (0x30, validity, _) = element(fields)? else { return None };
            let (from_tag, from, rest) = element(validity)?;
            let (until_tag, until, _) = element(rest)?;
            Some((time(from_tag, from)?, time(until_tag, until)?))
        };
        let (not_before, not_after) =
            read().ok_or_else(|| TransportError::Certificate("its dates can't be read".into()))?;
        Ok(Self { issued_at: not_before.saturating_add(CLOCKS_APART), expires_at: not_after })
    }
}

/// Seconds since the Unix epoch, now.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The first element of DER: its tag, what it holds, and what is behind it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (inside, behind) = rest.split_at_checked(length)?;
    Some((tag, inside, behind))
}

/// UTCTime (`YYMMDDHHMMSSZ`, up to 2049) or GeneralizedTime (`YYYYMMDDHHMMSSZ`), as RFC 5280, 4.1.2.5, allows them.
fn time(tag: u8, text: &[u8]) -> Option<u64> {
    let digits = text.strip_suffix(b"Z")?;
    let two = |at: usize| -> Option<u64> {
        let pair = std::str::from_utf8(digits.get(at..at + 2)?).ok()?;
        pair.bytes().all(|b| b.is_ascii_digit()).then(|| pair.parse().ok())?
    };
    let (year, at) = match (tag, digits.len()) {
        (0x17, 12) => (two(0)? + if two(0)? < 50 { 2_000 } else { 1_900 }, 2),
        (0x18, 14) => (two(0)? * 100 + two(2)?, 4),
        _ => return None,
    };
    let (month, day) = (two(at)?, two(at + 2)?);
    let (hour, minute, second) = (two(at + 4)?, two(at + 6)?, two(at + 8)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || year < 1970 {
        return None;
    }
    // Years that begin in March end with the leap day; 153 days are five months from there.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    let since_1970 = days.checked_sub(719_468)?;
    Some(since_1970 * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d '2026-11-24 16:30:00' +%s`, and so on.
        for (tag, text, expected) in [
            (0x17, "700101000000Z", 0),
            (0x17, "000229120000Z", 951_825_600),
            (0x17, "261124163000Z", 1_795_537_800),
            (0x18, "20500301000000Z", 2_529_705_600),
            (0x18, "21200101000000Z", 4_733_510_400),
        ] {
            assert_eq!(time(tag, text.as_bytes()), Some(expected), "{text}");
        }
        for (tag, bad) in [
            (0x17, "261124163000"),
            (0x17, "20261124163000Z"),
            (0x18, "261124163000Z"),
            (0x17, "261324163000Z"),
            (0x17, "26112416300xZ"),
            (0x17, "+61124163000Z"),
            (0x04, "261124163000Z"),
            (0x17, "é"),
        ] {
            assert_eq!(time(tag, bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn two_thirds_of_a_life_are_waited_for() {
        let quarter = Validity::lasting(1_000, Duration::from_secs(90));
        for (now, due, over) in
            [(1_000, false, false), (1_059, false, false), (1_060, true, false), (1_090, true, true)]
        {
            assert_eq!((quarter.is_due(now), quarter.is_over(now)), (due, over), "{now}");
        }
        let to_2120 = Validity { issued_at: 1_577_836_800, expires_at: 4_733_510_400 };
        assert!(to_2120.is_due(1_795_537_800), "of a build that renewed nothing");
    }

    #[test]
    fn what_is_no_certificate_has_no_dates() {
        for bytes in
            [&[][..], &[0x30], &[0x30, 0x80], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &[0x30, 2, 0x30, 0]]
        {
            assert!(Validity::of_certificate(&CertificateDer::from(bytes.to_vec())).is_err(), "{bytes:?}");
        }
    }
}
