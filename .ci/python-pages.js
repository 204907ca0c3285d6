// The cell of an exercise becomes an editor with three buttons. Python is loaded when it is to run, and not before.
(() => {
  const SECONDS = 10;
  const here = document.currentScript.src;

  function element(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function edit(place) {
    const exercise = JSON.parse(place.querySelector("script").textContent);
    const text = element("textarea", {
      value: exercise.cell, rows: exercise.cell.split("\n").length + 1, wrap: "off", spellcheck: false,
      autocapitalize: "off", ariaLabel: "Python code",
    });
    const output = element("output", { className: "python-output" });
    const run = element("button", { type: "button", textContent: "Run" });
    const reset = element("button", { type: "button", textContent: "Reset" });
    const answer = element("button", { type: "button", textContent: "Show the answer" });
    const hint = element("span", { textContent: "or Ctrl + Enter" });
    let worker, waiting;

    function end(said = "") {
      clearTimeout(waiting);
      worker?.terminate();
      worker = undefined;
      output.append(said);
      run.disabled = false;
    }

    function start() {
      if (worker) return;
      output.textContent = "Python is loaded ...";
      run.disabled = true;
      worker = new Worker(new URL("python-worker.js", here));
      worker.onmessage = ({ data }) => {
        if (data.started) begin();
        else if (data.done) end();
        else output.append(data);
      };
      worker.onerror = (event) => { event.preventDefault(); end(`Python could not run: ${event.message ?? ""}`); };
      worker.postMessage({ source: text.value, expected: exercise.expected });
    }

    function begin() {
      output.textContent = "";
      waiting = setTimeout(() => end(`stopped: not finished after ${SECONDS} seconds`), SECONDS * 1000);
    }

    function show(code) {
      end();
      text.value = code;
      output.textContent = "";
      text.focus();
      text.setSelectionRange(0, 0);
      text.scrollTop = 0;
    }

    // a new line begins where the one before it does; Tab keeps its meaning, the next thing on the page
    function key(event) {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      if (event.ctrlKey || event.metaKey || event.shiftKey) return start();
      const line = text.value.slice(0, text.selectionStart).split("\n").at(-1);
      const deeper = line.trimEnd().endsWith(":") ? "    " : "";
      document.execCommand("insertText", false, "\n" + line.match(/^ */)[0] + deeper); // which can be undone
    }

    text.addEventListener("keydown", key);
    run.addEventListener("click", start);
    reset.addEventListener("click", () => show(exercise.cell));
    answer.addEventListener("click", () => show(exercise.answer));
    place.nextElementSibling.hidden = true;
    place.append(text, element("div", { className: "python-buttons" }, run, reset, answer, hint), output);
  }

  document.querySelectorAll(".python-exercise").forEach(edit);
})();
