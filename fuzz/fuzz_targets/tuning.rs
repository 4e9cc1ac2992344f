//! A tuning file of any content is loaded or refused.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(&file, content).expect("a temporary file can be written");
    if let Err(error) = candle_fused_layer_norm::tuning::load(&file) {
        assert!(error.to_string().starts_with("tuning: "), "{error}");
    }
});
