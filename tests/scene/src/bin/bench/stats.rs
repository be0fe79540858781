//! Statistics of repeated measurements.

use std::time::{Duration, Instant};

/// Below this many samples, all that was measured is the spread; from here on, the middle half.
const FEW: usize = 8;

/// Samples of one thing, in seconds, bytes or pieces.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cell {
    pub median: f64,
    pub quartiles: [f64; 2],
    pub extremes: [f64; 2],
    pub samples: usize,
}

impl Cell {
    /// None means that nothing was measured.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&least, &most) = (sorted.first()?, sorted.last()?);
        Some(Self {
            median: quantile(&sorted, 0.5),
            quartiles: [quantile(&sorted, 0.25), quantile(&sorted, 0.75)],
            extremes: [least, most],
            samples: sorted.len(),
        })
    }

    pub fn one(value: f64) -> Option<Self> {
        Self::of(&[value])
    }

    /// The range that a table shows beside the median.
    pub fn spread(&self) -> [f64; 2] {
        if self.samples < FEW { self.extremes } else { self.quartiles }
    }
}

/// A quantile of at least one sorted sample, with linear interpolation.
pub fn quantile(sorted: &[f64], at: f64) -> f64 {
    let place = float(sorted.len() - 1) * at;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[allow(clippy::cast_precision_loss)]
pub fn float(number: usize) -> f64 {
    number as f64
}

/// Seconds that `work` takes.
pub fn seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let begun = Instant::now();
    let result = work();
    (begun.elapsed().as_secs_f64(), result)
}

/// Seconds of each call of `work`: `times` of them, fewer when `limit` passes, one at least.
/// The first failure ends it.
pub fn sample<E>(times: usize, limit: Duration, mut work: impl FnMut(usize) -> Result<(), E>) -> Result<Vec<f64>, E> {
    let until = Instant::now() + limit;
    let mut samples = Vec::with_capacity(times);
    for n in 0..times {
        let (seconds, result) = seconds(|| work(n));
        result?;
        samples.push(seconds);
        if Instant::now() > until {
            break;
        }
    }
    Ok(samples)
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_samples() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!([0.0, 0.5, 1.0].map(|at| quantile(&sorted, at)), [1.0, 3.0, 8.0]);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn spread_covers_all_of_few_samples_and_middle_half_of_many() {
        let few = Cell::of(&[3.0, 1.0, 2.0]).map(|cell| (cell.median, cell.spread()));
        assert_eq!(few, Some((2.0, [1.0, 3.0])));
        let many: Vec<f64> = (0..101_u8).map(f64::from).collect();
        let many = Cell::of(&many).map(|cell| (cell.median, cell.spread(), cell.samples));
        assert_eq!(many, Some((50.0, [25.0, 75.0], 101)));
        assert_eq!(Cell::of(&[]), None);
    }

    #[test]
    fn sampling_stops_at_the_first_failure() {
        let failed = sample(10, Duration::from_mins(1), |n| if n < 3 { Ok(()) } else { Err(n) });
        assert_eq!(failed, Err(3));
    }
}
