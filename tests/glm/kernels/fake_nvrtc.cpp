// Stands in for NVRTC: "compiles" for sm_61 and sm_90, to a text that says what was asked for.

#include <cstring>
#include <string>

struct Program { std::string source, log, cubin; };

static int num_compiled = 0;

extern "C" {

int nvrtcVersion(int *major, int *minor) { *major = 12, *minor = 9; return 0; }

const char *nvrtcGetErrorString(int status) { return status == 5 ? "NVRTC_ERROR_INVALID_OPTION" : "NVRTC_ERROR"; }

int nvrtcCreateProgram(Program **program, const char *source, const char *, int, const char **, const char **)
{
    *program = new Program{source, "", ""};
    return 0;
}

int nvrtcCompileProgram(Program *program, int num_options, const char **options)
{
    program->cubin = "cubin";
    for (int i = 0; i < num_options; ++i) program->cubin += std::string(" ") + options[i];
    ++num_compiled;
    if (program->cubin.find("sm_61") == std::string::npos && program->cubin.find("sm_90") == std::string::npos) {
        program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
        return 6;
    }
    return 0;
}

int nvrtcDestroyProgram(Program **program) { delete *program; return 0; }
int nvrtcGetCUBINSize(Program *program, size_t *size) { *size = program->cubin.size(); return 0; }
int nvrtcGetCUBIN(Program *program, char *to) { memcpy(to, program->cubin.data(), program->cubin.size()); return 0; }
int nvrtcGetPTXSize(Program *, size_t *) { return 1; }
int nvrtcGetPTX(Program *, char *) { return 1; }
int nvrtcGetProgramLogSize(Program *program, size_t *size) { *size = program->log.size() + 1; return 0; }
int nvrtcGetProgramLog(Program *program, char *to) { strcpy(to, program->log.c_str()); return 0; }
int fake_num_compiled() { return num_compiled; }

}
