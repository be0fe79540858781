//! Values in the buckets of Go programs: text, labels, variable-length integers and times. Pure.
#![forbid(unsafe_code)]

use super::bolt::{Entries, Entry};
use super::chain_validation::RejectReason;
use crate::model::{Labels, Timestamp};

/// The value of a field. None: there is no such field, or it is a bucket.
pub fn value<'b>(fields: &Entries<'b>, name: &[u8]) -> Option<&'b [u8]> {
    match fields.get(name) {
        Some(Entry::Value(value)) => Some(*value),
        _ => None,
    }
}

pub fn text(bytes: &[u8]) -> Result<&str, RejectReason> {
    std::str::from_utf8(bytes).map_err(|_| RejectReason::NotText)
}

/// The labels in a bucket.
pub fn labels(entries: &Entries<'_>) -> Result<Labels, RejectReason> {
    let values = entries.iter().filter_map(|(key, entry)| match entry {
        Entry::Value(value) => Some((*key, *value)),
        Entry::Bucket(_) => None,
    });
    values.map(|(key, value)| Ok((text(key)?.to_owned(), text(value)?.to_owned()))).collect()
}

/// Decodes an integer of Go's `binary.PutUvarint`.
pub fn unsigned(bytes: &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for (n, byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        number |= bits.checked_shl(7 * u32::try_from(n).ok()?)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Decodes an integer of Go's `binary.PutVarint`.
pub fn signed(bytes: &[u8]) -> Option<i64> {
    let number = unsigned(bytes)?;
    let half = (number >> 1).cast_signed();
    Some(if number & 1 == 0 { half } else { !half })
}

/// Decodes a time of Go's `Time.MarshalBinary`: a version, seconds since the year 1, nanoseconds, and a time zone.
pub fn time(bytes: &[u8]) -> Option<Timestamp> {
    const SECONDS_TO_1970: i64 = 62_135_596_800;
    let (version, rest) = bytes.split_first()?;
    let (seconds, rest) = rest.split_first_chunk()?;
    let (nanoseconds, zone) = rest.split_first_chunk()?;
    if !matches!((version, zone.len()), (1, 2) | (2, 3)) {
        return None;
    }
    let seconds = i64::from_be_bytes(*seconds).checked_sub(SECONDS_TO_1970)?;
    let nanoseconds = i64::from(i32::from_be_bytes(*nanoseconds));
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds).map(Timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_writes_them() {
        for (bytes, expected) in [
            (&[0][..], Some(0)),
            (&[0xac, 0x02], Some(300)),
            (&[], None),
            (&[0x80], None),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], Some(u64::MAX)),
            (&[0x80; 12], None),
        ] {
            assert_eq!(unsigned(bytes), expected, "{bytes:?}");
        }
        assert_eq!([&[0][..], &[1], &[2], &[3]].map(signed), [Some(0), Some(-1), Some(1), Some(-2)]);
    }

    #[test]
    fn time_is_read_to_the_nanosecond() {
        // 2001-09-09T01:46:40.123456789Z, and the same with a zone that has seconds.
        let utc = [1, 0, 0, 0, 0x0e, 0xb3, 0x2c, 0xc1, 0, 0x07, 0x5b, 0xcd, 0x15, 0xff, 0xff];
        assert_eq!(time(&utc), Some(Timestamp(1_000_000_000_123_456_789)));
        let mut zone = utc.to_vec();
        zone.push(7);
        assert_eq!(time(&zone), None, "version 1 has no seconds in its zone");
        zone[0] = 2;
        assert_eq!(time(&zone), Some(Timestamp(1_000_000_000_123_456_789)));
        let far = [1, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0];
        assert_eq!((time(&far), time(&[]), time(&[1, 2])), (None, None, None));
    }
}
