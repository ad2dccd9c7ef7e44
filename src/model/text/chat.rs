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
            "title" | "capitalize" => state.apply_filter(method, std::slice::from_ref(value))?,
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
        (ValueKind::Map, "items") => state.apply_filter("items", std::slice::from_ref(value)),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.to_owned(), content: content.to_owned() }
    }

    fn render(template: &str, messages: &[ChatMessage]) -> Result<String, ModelError> {
        ChatTemplate::new(template.to_owned()).render(messages, true, Some("<s>"), None)
    }

    fn refusal(template: &str) -> String {
        match render(template, &[]) {
            Err(ModelError::ChatTemplate { problem }) => problem,
            other => panic!("{template}: {other:?}"),
        }
    }

    #[test]
    fn trims_blocks_as_transformers_does() {
        let template = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m['content'] | trim }}\n    {% else %}\nA: {{ m['content'] }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}A:{% endif %}\n";
        let chat = [message("user", " 1 "), message("assistant", "2"), message("user", "<&\"3'>")];
        let expected = "<s>\nU: 1\nA: 2\nU: <&\"3'>\nA:";
        assert_eq!(render(template, &chat).unwrap(), expected);
    }

    #[test]
    fn calls_methods_as_python_does() {
        let cases = [
            (
                "{{ ' a '.strip() }}|{{ ' a '.lstrip() }}|{{ ' a '.rstrip() }}|{{ 'xax'.strip('x') }}",
                "a|a | a|a",
            ),
            ("{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('ab') }}", "True False"),
            (
                "{{ 'a,b,c'.split(',')[-1] }} {{ 'a,b,c'.split(',', 1)[1] }} {{ ' a  b '.split() | length }}",
                "c b,c 2",
            ),
            (
                "{{ 'aXa'.upper() }}{{ 'aXa'.lower() }}{{ 'ab'.title() }}{{ 'aa'.replace('a', 'b') }}",
                "AXAaxaAbbb",
            ),
            ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "x1"),
            (
                "{{ {'x': 1}.get('x') }} {{ {'x': 1}.get('y', 2) }} {{ {'x': 1}.get('y') is none }}",
                "1 2 True",
            ),
            ("{{ {'a': [1, '<é>']} | tojson }}", r#"{"a": [1, "<é>"]}"#),
            ("{{ {'a': 1} | tojson(indent=2) }}", "{\n  \"a\": 1\n}"),
            (
                "{{ tools is none }} {{ eos_token is defined }} {{ strftime_now is defined }}",
                "True False False",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
                "3",
            ),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template, &[]).as_deref(), Ok(expected), "{template}");
        }
    }

    #[test]
    fn says_what_a_template_refuses() {
        let raised = refusal("{{ raise_exception('roles must alternate') }}");
        assert!(raised.contains("roles must alternate"), "{raised}");
        assert!(refusal("{{ 'a'.nonsense() }}").contains("nonsense"));
        assert!(refusal("{{ strftime_now('%d') }}").contains("strftime_now"));
        assert!(refusal("{% if %}").contains("syntax error"));
    }

    #[test]
    fn gives_no_access_to_files() {
        for template in ["{% include '/etc/passwd' %}", "{% extends '../x' %}", "{% import 'x' as x %}"] {
            assert!(refusal(template).contains("not found"), "{template}");
        }
    }

    #[test]
    fn stops_templates_that_run_or_grow_without_end() {
        let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
        assert!(refusal(endless).contains("fuel"));
        let long = "{% for i in range(99) %}{{ 'a' * 1000000 }}{% endfor %}";
        assert!(refusal(long).contains("grows past"), "{}", refusal(long));
        let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        assert!(refusal(deep).contains("recursion"), "{}", refusal(deep));
    }
}
