//! Chat templates: Jinja, written by whoever published the model, so run with bounds and
//! without access to anything but the conversation.
//!
//! What transformers gives a template is given here: `messages`, `add_generation_prompt`,
//! `bos_token`, `eos_token`, `tools` and `documents` (none), `raise_exception`, blocks trimmed
//! as there, and Python's methods on strings and maps. `strftime_now` is deliberately absent: a
//! prompt that depends on the day can't be replayed. Templates ask whether it is defined.

use std::io::{self, Write};

use minijinja::{
    Environment, Error, ErrorKind, State, Value, context,
    value::{Kwargs, ValueKind, from_args},
};

use super::ChatMessage;
use crate::model::ModelError;

/// Instructions one rendering may take; a message takes some tens.
const FUEL: u64 = 2_000_000;

/// Longest prompt a template may make, in bytes.
const MAX_PROMPT_BYTES: usize = 16 << 20;

const NAME: &str = "chat_template";

/// A compiled template, or why it can't be compiled.
pub(super) struct ChatTemplate {
    source: String,
    compiled: Result<Environment<'static>, ModelError>,
}

impl ChatTemplate {
    pub fn new(source: String) -> Self {
        Self { compiled: compile(source.clone()).map_err(problem), source }
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<String, ModelError> {
        let environment = self.compiled.as_ref().map_err(Clone::clone)?;
        let template = environment.get_template(NAME).map_err(problem)?;
        // transformers leaves a token that the model lacks undefined, and passes None for tools.
        let token = |text: Option<&str>| text.map_or(Value::UNDEFINED, Value::from);
        let conversation = context! {
            messages => messages,
            add_generation_prompt,
            bos_token => token(bos_token),
            eos_token => token(eos_token),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let mut prompt = Bounded(Vec::new());
        template.render_captured_to(conversation, &mut prompt).map_err(problem)?;
        String::from_utf8(prompt.0).map_err(|error| ModelError::ChatTemplate { problem: error.to_string() })
    }
}

fn compile(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// Python's methods that templates call on strings and maps.
fn python_method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let blank = |chars: &Option<String>, c: char| match chars {
            Some(chars) => chars.contains(c),
            None => c.is_whitespace(),
        };
        return Ok(match method {
            "strip" | "lstrip" | "rstrip" => {
                let (chars,): (Option<String>,) = from_args(args)?;
                let text =
                    if method == "rstrip" { text } else { text.trim_start_matches(|c| blank(&chars, c)) };
                let text =
                    if method == "lstrip" { text } else { text.trim_end_matches(|c| blank(&chars, c)) };
                Value::from(text)
            }
            "startswith" => Value::from(text.starts_with(from_args::<(&str,)>(args)?.0)),
            "endswith" => Value::from(text.ends_with(from_args::<(&str,)>(args)?.0)),
            "upper" => Value::from(text.to_uppercase()),
            "lower" => Value::from(text.to_lowercase()),
            "title" | "capitalize" => state.apply_filter(method, &[value.clone()])?,
            "replace" => {
                let (from, to): (&str, &str) = from_args(args)?;
                Value::from(text.replace(from, to))
            }
            "split" => match from_args(args)? {
                (Some(separator), None) => text.split(separator).map(Value::from).collect(),
                (Some(separator), Some(limit)) => {
                    text.splitn(limit + 1, separator).map(Value::from).collect()
                }
                (None::<&str>, None::<usize>) => text.split_whitespace().map(Value::from).collect(),
                (None, Some(_)) => return Err(Error::from(ErrorKind::UnknownMethod)),
            },
            _ => return Err(Error::from(ErrorKind::UnknownMethod)),
        });
    }
    match (value.kind(), method) {
        (ValueKind::Map, "items") => state.apply_filter("items", &[value.clone()]),
        (ValueKind::Map, "keys") => value.try_iter().map(|keys| keys.collect()),
        (ValueKind::Map, "values") => {
            value.try_iter()?.map(|key| value.get_item(&key)).collect::<Result<Value, _>>()
        }
        (ValueKind::Map, "get") => {
            let (key, default): (Value, Option<Value>) = from_args(args)?;
            let found = value.get_item(&key)?;
            Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// JSON as transformers writes it into a prompt: nothing escaped for HTML, blanks as Python's.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let invalid = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    match indent {
        Some(width) => {
            let blanks = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&blanks);
            let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
            serde::Serialize::serialize(value, &mut serializer).map_err(invalid)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut json, PythonSpacing);
            serde::Serialize::serialize(value, &mut serializer).map_err(invalid)?;
        }
    }
    Ok(Value::from(String::from_utf8_lossy(&json).into_owned()))
}

/// `json.dumps` puts a blank after each comma and colon.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A buffer that refuses to grow past [`MAX_PROMPT_BYTES`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_PROMPT_BYTES {
            let problem = format!("the prompt grows past {MAX_PROMPT_BYTES} bytes");
            return Err(io::Error::other(problem));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The template's own words, with those of what caused them.
fn problem(error: Error) -> ModelError {
    use std::error::Error as _;
    let mut problem = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        problem = format!("{problem}: {inner}");
        cause = inner.source();
    }
    ModelError::ChatTemplate { problem }
}
