use lockstep::types::{Datum, SamplingParams};

/// A datum as a script sends it: checked, or refused. One that was taken is written as JSON that is
/// taken again.
pub fn datum_json(bytes: &[u8]) {
    if let Ok(datum) = serde_json::from_slice::<Datum>(bytes) {
        let written = serde_json::to_vec(&datum).expect("a datum is JSON");
        serde_json::from_slice::<Datum>(&written).expect("what was just written is a datum");
        let _ = datum.model_input.to_ints();
    }
    if let Ok(params) = serde_json::from_slice::<SamplingParams>(bytes) {
        let _ = params.validate();
    }
}
