//! Text as bytes, split into a part to train on and a part held out.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use rand::Rng;
use std::path::Path;

/// A token is a byte.
pub const VOCAB_SIZE: usize = 256;

/// This crate's own documents and sources.
const BUILT_IN: &[&str] = &[
    include_str!("../../README.md"),
    include_str!("../../src/lib.rs"),
    include_str!("../../src/layer_norm.rs"),
    include_str!("../../src/ops.rs"),
    include_str!("../../src/op.rs"),
    include_str!("../../src/problem.rs"),
    include_str!("../../src/composed.rs"),
    include_str!("../../src/plan.rs"),
    include_str!("../../src/cpu/mod.rs"),
    include_str!("../../src/cpu/row.rs"),
    include_str!("../../src/cpu/element.rs"),
    include_str!("main.rs"),
    include_str!("model.rs"),
    include_str!("data.rs"),
    include_str!("train.rs"),
];

pub struct Corpus {
    pub train: Vec<u8>,
    pub held_out: Vec<u8>,
}

impl Corpus {
    /// The text in the file at `path`, or the built-in one.
    pub fn load(path: Option<&Path>, context: usize) -> Result<Self> {
        let Some(path) = path else {
            let documents = BUILT_IN.iter().map(|text| text.as_bytes());
            return Self::split(documents, context).context("the built-in text is too short");
        };
        let name = path.display();
        let text = std::fs::read(path)
            .with_context(|| format!("cannot read {name}: give --text a readable file"))?;
        if text.is_empty() {
            bail!("{name} is empty: give --text a file with text in it");
        }
        Self::split([text.as_slice()], context).with_context(|| format!("{name} is too short"))
    }

    /// Holds out the last tenth of each document.
    ///
    /// By position, not at random: text repeats itself nearby, so windows drawn from all of it would let the model see
    /// the surroundings of what it is tested on. In each document, not in all of them joined: the last tenth of that
    /// would be a single file, unlike the others.
    fn split<'a>(documents: impl IntoIterator<Item = &'a [u8]>, context: usize) -> Result<Self> {
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for document in documents {
            let (head, tail) = document.split_at(document.len() * 9 / 10);
            train.extend_from_slice(head);
            held_out.extend_from_slice(tail);
        }
        if held_out.len() <= context {
            bail!(
                "the tenth that is held out has {} bytes, --context {context} needs {}: give --text a file of at \
                 least {} bytes or lower --context",
                held_out.len(),
                context + 1,
                10 * context + 1,
            );
        }
        Ok(Self { train, held_out })
    }
}

/// The windows of `context` tokens that begin at `starts`, and the tokens that follow each of theirs, both
/// `[starts.len(), context]`.
pub fn windows(
    text: &[u8],
    starts: &[usize],
    context: usize,
    device: &Device,
) -> candle_core::Result<(Tensor, Tensor)> {
    let shifted = |shift| {
        let ids: Vec<u32> = starts
            .iter()
            .flat_map(|start| &text[start + shift..][..context])
            .map(|&byte| u32::from(byte))
            .collect();
        Tensor::from_vec(ids, (starts.len(), context), device)
    };
    Ok((shifted(0)?, shifted(1)?))
}

/// Where `count` windows begin, drawn from all of `text`, which must be longer than `context`.
pub fn random_starts(text: &[u8], count: usize, context: usize, rng: &mut impl Rng) -> Vec<usize> {
    (0..count)
        .map(|_| rng.random_range(..text.len() - context))
        .collect()
}

/// Where at most `count` windows begin, spread evenly over `text` without overlap; `text` must be longer than `context`.
pub fn even_starts(text: &[u8], count: usize, context: usize) -> Vec<usize> {
    let last = text.len() - context - 1;
    let count = count.min((text.len() - 1) / context);
    (0..count).map(|i| i * last / (count - 1).max(1)).collect()
}

/// `ids` as text for a terminal: what is no text is shown as a replacement character.
pub fn decode(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
    String::from_utf8_lossy(&bytes)
        .chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_each_document_once_in_order() {
        let documents: Vec<Vec<u8>> = vec![(0..100).collect(), (100..137).collect()];
        let corpus = Corpus::split(documents.iter().map(Vec::as_slice), 8).unwrap();
        assert_eq!(corpus.train, (0..90).chain(100..133).collect::<Vec<u8>>());
        assert_eq!(
            corpus.held_out,
            (90..100).chain(133..137).collect::<Vec<u8>>()
        );
    }

    #[test]
    fn the_length_that_the_error_names_is_enough() {
        let text = vec![b'a'; 10 * 64 + 1];
        assert!(Corpus::split([text.as_slice()], 64).is_ok());
        assert!(Corpus::split([&text[1..]], 64).is_err());
    }

    #[test]
    fn targets_are_the_next_tokens() {
        let (ids, targets) = windows(b"abcdefgh", &[0, 4], 3, &Device::Cpu).unwrap();
        let bytes = |tensor: Tensor| decode(&tensor.flatten_all().unwrap().to_vec1().unwrap());
        assert_eq!(bytes(ids), "abcefg");
        assert_eq!(bytes(targets), "bcdfgh");
    }

    #[test]
    fn windows_stay_inside_the_text() {
        let mut rng = rand::rng();
        for len in 5..60 {
            let text = vec![0; len];
            let even = even_starts(&text, 6, 4);
            assert_eq!(even.len(), ((len - 1) / 4).min(6), "{len}");
            assert!(even.windows(2).all(|pair| pair[0] + 4 <= pair[1]), "{len}");
            let random = random_starts(&text, 100, 4, &mut rng);
            for starts in [even, random] {
                windows(&text, &starts, 4, &Device::Cpu).unwrap();
            }
        }
    }

    #[test]
    fn a_sample_cannot_send_control_codes() {
        let ids: Vec<u32> = b"a\n\x1b[2J\xff".iter().map(|&b| b.into()).collect();
        assert_eq!(decode(&ids), "a\n\u{fffd}[2J\u{fffd}");
    }
}
