//! Dropout without a mask in memory: whether an element is kept is a function of a seed and the element's index.

use candle_core::{Result, bail};

/// Dropout of the elements of a tensor: each is set to 0 with `probability`, and multiplied by `1 / (1 - probability)` otherwise.
///
/// The random numbers are those of Philox4x32-10 with key `seed`: element i takes word i % 4 of counter i / 4, and is dropped where
/// that is below `probability * 2^32`. So the same seed drops the same elements on every device, forward and backward, and
/// no mask is kept. Take another seed for each call.
///
/// Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting" (2014); Salmon et al.,
/// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// From 0 to below 1; 0 drops nothing.
    pub probability: f32,
    /// Decides which elements are dropped.
    pub seed: u64,
}

impl Dropout {
    pub(crate) fn check(&self, op: &str) -> Result<()> {
        if !(0. ..1.).contains(&self.probability) {
            bail!(
                "{op}: dropout: expected a probability from 0 to below 1, got {}",
                self.probability
            )
        }
        Ok(())
    }

    /// A word below it drops its element.
    pub(crate) fn threshold(&self) -> u32 {
        // Exact: a power of 2 times an f32 below 1.
        (f64::from(self.probability) * 4_294_967_296.) as u32
    }

    /// By what the elements that are kept are multiplied.
    pub(crate) fn scale(&self) -> f64 {
        1. / (1. - f64::from(self.probability))
    }

    /// The words of elements `4 * counter` to `4 * counter + 3`.
    #[inline(always)]
    pub(crate) fn words(&self, counter: u64) -> [u32; 4] {
        let halves = |v: u64| (v as u32, (v >> 32) as u32);
        let ((c0, c1), mut key) = (halves(counter), halves(self.seed));
        let mut c = [c0, c1, 0, 0];
        for _ in 0..10 {
            let (low0, high0) = halves(0xD251_1F53 * u64::from(c[0]));
            let (low1, high1) = halves(0xCD9E_8D57 * u64::from(c[2]));
            c = [high1 ^ c[1] ^ key.0, low1, high0 ^ c[3] ^ key.1, low0];
            key.0 = key.0.wrapping_add(0x9E37_79B9);
            key.1 = key.1.wrapping_add(0xBB67_AE85);
        }
        c
    }

    /// Calls `f` with the words of `len` elements from element `first` on, and their places from 0.
    #[inline(always)]
    pub(crate) fn for_each_word(&self, first: usize, len: usize, mut f: impl FnMut(usize, u32)) {
        let mut element = first;
        while element < first + len {
            let words = self.words(element as u64 / 4);
            for word in &words[element % 4..] {
                if element < first + len {
                    f(element - first, *word);
                }
                element += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeded(seed: u64) -> Dropout {
        Dropout {
            probability: 0.25,
            seed,
        }
    }

    /// The known answers that the generator's authors publish.
    #[test]
    fn words_are_those_of_philox() {
        assert_eq!(
            seeded(0).words(0),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
    }

    #[test]
    fn an_element_has_the_same_word_wherever_a_walk_begins() {
        let dropout = seeded(7);
        let words = |first, len| {
            let mut words = Vec::new();
            dropout.for_each_word(first, len, |place, word| {
                assert_eq!(place, words.len());
                words.push(word);
            });
            words
        };
        let all = words(0, 64);
        for first in 0..9 {
            assert_eq!(words(first, 13), all[first..first + 13]);
        }
    }

    #[test]
    fn as_many_are_dropped_as_probable() {
        let dropout = seeded(3);
        let mut dropped = 0;
        dropout.for_each_word(0, 1 << 20, |_, word| {
            dropped += usize::from(word < dropout.threshold());
        });
        // Five standard deviations.
        let expected = (1 << 20) as f64 * 0.25;
        assert!((dropped as f64 - expected).abs() < 5. * (expected * 0.75).sqrt());
    }

    #[test]
    fn probabilities_outside_are_refused() {
        for probability in [-0.1, 1., f32::NAN] {
            let error = Dropout {
                probability,
                seed: 0,
            }
            .check("layer-norm")
            .unwrap_err();
            let expected = format!(
                "layer-norm: dropout: expected a probability from 0 to below 1, got {probability}"
            );
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        Dropout {
            probability: 0.,
            seed: 0,
        }
        .check("layer-norm")
        .unwrap();
    }
}
