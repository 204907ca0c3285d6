// Python for one run of a cell. The page ends this worker when it has its answer, or when it has waited long enough.
importScripts("brython.js", "modules.js");

onmessage = ({ data }) => {
  postMessage({ started: true });
  // text and numbers of JSON read the same in Python
  const program = `from run_cell import run\nrun(${JSON.stringify(data.source)}, ${JSON.stringify(data.expected)})`;
  __BRYTHON__.runPythonSource(program, "__main__");
  postMessage({ done: true });
};
